"""The commands and their errors: a user's error is one sentence, not a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sharded_spd.cli.anchor import anchor_app
from sharded_spd.cli.interpolate import interpolate
from sharded_spd.errors import AnchorError, BindingError, CheckpointError, ConfigError, UnsupportedError
from sharded_spd.finetune.config import JobConfig, load_job
from sharded_spd.finetune.run.launch import follow_supervisor, supervise
from sharded_spd.finetune.world import RankLost, has_joined, started_as_rank

USER_ERRORS = (ConfigError, AnchorError, BindingError, UnsupportedError)
FAILURES = (CheckpointError, RankLost)
"""Failures of the run itself; the command line was right."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(anchor_app, name="anchor")
app.command()(interpolate)


@app.callback()
def sharded_spd() -> None:
    """Selective Projection Decay for sharded training."""


@app.command()
def finetune(
    config: Annotated[
        str | None,
        typer.Argument(help="The job's YAML file; the built-in quickstart (handwritten digits) if left out."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides: train.lr=1e-4, ranks=4, spd=@configs/rules/l2sp.yaml"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Resume a run's directory, or the newest unfinished run of this job: auto."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the job would do and need, and stop.")
    ] = False,
) -> None:
    """Fine-tune a Hugging Face checkpoint, test it in and out of distribution, and compare methods."""
    overrides = list(settings or ())
    if config is not None and "=" in config and not Path(config).exists():
        overrides.insert(0, config)
        config = None
    path = Path(config) if config is not None else quickstart_recipe()
    job = load_job(path, overrides)
    if dry_run:
        _describe(job)
        return
    try:
        go_on = [] if resume is None else ["--resume", resume]
        code = _start(job, ["finetune", str(path), *overrides, *go_on], resume)
    except KeyboardInterrupt:  # before the handlers are installed
        print("Stopped before anything was saved.", file=sys.stderr)
        code = 128 + signal.SIGINT
    raise typer.Exit(code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The output folder of a run, finished or interrupted.")],
) -> None:
    """Write report.html of a run into its folder, from metrics.jsonl."""
    from sharded_spd.finetune.report.page import write_report

    try:
        print(write_report(run))
    except OSError as error:
        raise ConfigError(f"{run}: the report cannot be written: {error.strerror}") from None


def quickstart_recipe() -> Path:
    """The built-in recipe: packaged with an installation, in `configs/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (
        package / "recipes" / "quickstart.yaml",
        package.parent / "configs" / "recipes" / "quickstart.yaml",
    )
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"the built-in recipe is neither at {places[0]} nor at {places[1]}: name a YAML file")


def _describe(job: JobConfig) -> None:
    """Print what the job would do; if a launcher has started several ranks, on rank 0 only."""
    from sharded_spd.finetune.run.dryrun import dry_run
    from sharded_spd.finetune.run.job import check_job, quiet_libraries

    quiet_libraries()
    check_job(job)
    if os.environ.get("RANK", "0") == "0":
        dry_run(job, ranks=int(os.environ.get("WORLD_SIZE", job.ranks)))


def _start(job: JobConfig, arguments: Sequence[str], resume: str | None) -> int:
    """Be a rank of the job if a launcher says so, its only rank, or the one that starts the ranks."""
    from sharded_spd.finetune.run.job import check_job, run_job

    if started_as_rank() or job.ranks == 1:
        return run_job(job, resume)
    check_job(job)
    return supervise(arguments, ranks=job.ranks)


def _leave(code: int) -> None:
    """End this process. One that was a rank skips the interpreter's shutdown.

    During shutdown gloo's threads have aborted a job that was done and saved, and a tracker that does not
    answer may block it.
    """
    from sharded_spd.finetune.report.tracking import left_behind

    sys.stdout.flush()
    sys.stderr.flush()
    if has_joined() or left_behind():
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Run the command line and exit: 0, 1 for a failure, 2 for a user's error, 130 or 143 after a signal."""
    follow_supervisor()
    try:
        app()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: out of memory: {error}; --dry-run says what the job takes", file=sys.stderr)
        code = 1
    _leave(code)
