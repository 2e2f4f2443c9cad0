"""`sharded-spd anchor`: write an anchor's files and manifest, verify them, show what they are."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.anchors.manifest import MANIFEST, Manifest
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.tools import build as work
from sharded_spd.cli.names import show_names
from sharded_spd.cli.progress import showing
from sharded_spd.errors import ConfigError

anchor_app = typer.Typer(no_args_is_help=True, help="Files of an anchor: build, verify, info.")
_PATH = typer.Argument(help="A safetensors file, an index, a directory, or a name in the hub's local cache.")


class DType(str, Enum):
    """The dtypes that floating point can be written in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@anchor_app.command("build")
def build(
    source: Annotated[str, _PATH],
    target: Annotated[
        str | None,
        typer.Argument(help=f"The new directory; without it only {MANIFEST} is written, next to the files."),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Of floating-point tensors; auto keeps the stored dtype.")
    ] = DType.auto,
    max_shard_size: Annotated[str, typer.Option(help="Of one file: 5GB, 512MiB.")] = "5GB",
    manifest_only: Annotated[bool, typer.Option("--manifest-only", help="As without a target.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the anchor in the manifest; by default the source.")
    ] = None,
) -> None:
    """Write an anchor's files with a manifest, or a manifest next to existing files."""
    if manifest_only or target is None:
        if target not in (None, source):
            raise ConfigError(f"--manifest-only writes beside {source}; got another target, {target}")
        if dtype is not DType.auto:
            raise ConfigError("--dtype rewrites the files: name a target directory for them")
        with showing("reading") as progress:
            manifest = work.add_manifest(source, name=name, progress=progress)
    else:
        to = None if dtype is DType.auto else getattr(torch, dtype.value)
        limit = work.parse_size(max_shard_size)
        with showing("copying") as progress:
            built = work.build(source, target, dtype=to, max_shard_bytes=limit, name=name, progress=progress)
        manifest = built.manifest
        if built.lossy:
            worst = max(built.lossy, key=lambda key: built.lossy[key])
            print(
                f"warning: {dtype.value} changed the values of {len(built.lossy)} tensor(s) "
                f"({some(built.lossy, 3)}), most in {worst}: by up to {built.lossy[worst]:.2g} of a value "
                "(inf: out of range)",
                file=sys.stderr,
            )
    print(f"wrote {manifest.path}")
    _show(manifest, "yes")


@anchor_app.command("verify")
def verify(
    path: Annotated[str, _PATH],
    sampled: Annotated[bool, typer.Option("--sampled", help="Sizes and a few blocks of each only.")] = False,
) -> None:
    """Compare the files with their manifest: exit code 0 if they match, 1 if not."""
    with showing("reading") as progress:
        found = work.verify(path, sampled=sampled, progress=progress)
    for sentence in found:
        print(sentence)
    if found:
        print(f"{path}: {len(found)} fault(s)")
        raise typer.Exit(1)
    print(f"{path}: as its manifest says" + (", as far as sizes and samples tell" if sampled else ""))


@anchor_app.command("info")
def info(
    path: Annotated[str, _PATH],
    names: Annotated[
        str | None,
        typer.Option(
            help="A folder with a transformers model's config.json: print the tensor of each of its layers."
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="With --names: PATTERN=NAME, as under names: in the settings; may be repeated."),
    ] = None,
) -> None:
    """Show what an anchor is. Without a manifest its fingerprint requires reading all of it."""
    if names is not None:
        parts = [one.partition("=") for one in rule or ()]
        rules = {pattern: replacement for pattern, _, replacement in parts}
        raise typer.Exit(1 if show_names(path, names, rules) else 0)
    if rule:
        raise ConfigError("--rule says what layers are called in the file: name the model, too, with --names")
    checkpoint = Checkpoint(path)
    manifest = checkpoint.manifest()
    if manifest is not None:
        _show(manifest, "yes (these figures are from it; verify compares them with the files)")
        return
    with showing("reading") as progress:
        manifest = work.scan(checkpoint, progress=progress)
    _show(manifest, "no (anchor build PATH writes one)")


def _show(manifest: Manifest, there: str) -> None:
    table = Table(show_header=False, box=None)
    rows = {
        "source": manifest.source,
        "files": f"{len(manifest.files)}, {sum(e.num_bytes for e in manifest.files.values()):,} bytes",
        "dtypes": ", ".join(manifest.dtypes),
        "tensors": f"{len(manifest.tensors):,}, {manifest.num_parameters:,} parameters",
        "fingerprint": manifest.fingerprint,
        "manifest": there,
    }
    for key, value in rows.items():
        table.add_row(key, Text(value))
    Console(soft_wrap=True).print(table)
