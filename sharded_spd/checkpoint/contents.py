"""The contents of a run's checkpoint, on this rank alone: no function here calls a collective."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.nn import Module

from sharded_spd.checkpoint.codec import split, tensor_names
from sharded_spd.checkpoint.folder import check_complete
from sharded_spd.checkpoint.live import RNG, Live, as_optimizers, check_fits, check_groups
from sharded_spd.checkpoint.ranks import Ranks
from sharded_spd.checkpoint.rng import rng_state
from sharded_spd.checkpoint.storage import METADATA, read_metadata
from sharded_spd.engines.deepspeed import is_of_deepspeed
from sharded_spd.errors import CheckpointError, UnsupportedError
from sharded_spd.projection.projector import Projector


def live_of(model: Module, optimizer: Any, projector: Projector | None, scheduler: Any, ranks: Ranks) -> Live:
    """The objects to save or load, including the projector of a given AdamSPD.

    Raises:
        UnsupportedError: an object keeps its state in a format of its own.
    """
    optimizers = () if is_of_deepspeed(model) else as_optimizers(optimizer)
    for candidate in (model, *optimizers):
        if type(candidate).__module__.startswith("fairscale") or hasattr(candidate, "consolidate_state_dict"):
            raise UnsupportedError(
                f"{type(candidate).__name__} keeps its state in a form of its own, which "
                "torch.distributed.checkpoint does not know; save what its own state_dict gives"
            )
    projectors = [p for o in optimizers if isinstance(p := getattr(o, "projector", None), Projector)]
    if projector is None and len(projectors) == 1:
        projector = projectors[0]
    return Live(model, optimizers, projector, scheduler, ranks)


def encoded(live: Live, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of `values`, and the rest as JSON, with this rank's additions.

    Raises:
        CheckpointError: a value cannot be stored.
    """
    if live.scheduler is not None:
        values["scheduler"] = live.scheduler.state_dict()
    tensors, rest = split(values)
    for name, state in rng_state().items():
        tensors[f"{RNG}/{live.rank}/{name}"] = state
    rest["anchors"] = live.anchors()
    return tensors, rest


def described(live: Live, folder: Path) -> tuple[Any, Any, str]:
    """The folder's metadata and values, checked to be of such a run, and a digest of its metadata file.

    Raises:
        CheckpointError: damaged, or of another kind of run.
        AnchorError: written with another anchor.
    """
    if is_of_deepspeed(live.model):  # it reads files that only the marker lists
        check_complete(folder)
    metadata, values = read_metadata(folder)
    live.check_anchors(values.get("anchors"))
    _check_parts(values, live, folder)
    return metadata, values, sha256((folder / METADATA).read_bytes()).hexdigest()


def _check_parts(values: Any, live: Live, folder: Path) -> None:
    engine = is_of_deepspeed(live.model)
    parts = {
        "model": not engine,
        "optimizer": bool(live.optimizers),
        "projector": live.projector is not None and not engine,
        "scheduler": live.scheduler is not None,
    }
    for part, wanted in parts.items():
        if wanted and not (part in values and isinstance(values[part], dict)):
            raise CheckpointError(f"{folder}: was saved without a {part}; load it without, too")


def check_contents(
    own: Mapping[str, Any], parts: Mapping[str, Any], metadata: Any, values: Any, folder: Path
) -> None:
    """Check that a checkpoint's tensors and values fit those of this run, `own` and `parts`.

    Raises:
        CheckpointError: lists all mismatches.
    """
    stepped: list[str] = []
    if "optimizer" in parts:
        groups = parts["optimizer"]["param_groups"]
        check_groups(groups, values["optimizer"].get("param_groups"), folder)
        stepped = [fqn for group in groups for fqn in group["params"]]
    check_fits(own, stepped, metadata, folder)
    # Anchors' fingerprints are not encoded; they are keyed by layer, and a layer may have any name.
    others = {key: value for key, value in values.items() if key != "anchors"}
    lost = [name for name in tensor_names(others) if name not in metadata.state_dict_metadata]
    if lost:
        raise CheckpointError(f"{folder}: is damaged: it has no tensor {lost[0]!r}")
