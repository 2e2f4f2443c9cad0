"""`sharded-spd interpolate`: checkpoints between a pre-trained and a fine-tuned one, and their scores."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sharded_spd.anchors.paths import some
from sharded_spd.anchors.tools import interpolate as work
from sharded_spd.anchors.tools.alphas import folder_of, parse_alphas
from sharded_spd.anchors.tools.lineage import is_same
from sharded_spd.cli.progress import showing
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import load_job

if TYPE_CHECKING:
    from sharded_spd.finetune.metrics import Metric, UserMetric
    from sharded_spd.finetune.report.score_file import Scored

_PATH = "a safetensors file, an index, a directory, or a name in the hub's local cache"
_ALPHA = (
    "0: the first, 1: the second, below 0 or above 1: extrapolated. 0.5, or 0.3,0.5, or FIRST:LAST:STEP: "
    "0:1:0.1 ends at 1, 0:1:0.3 at 0.9."
)


def interpolate(
    start: Annotated[str, typer.Argument(help=f"The pre-trained checkpoint: {_PATH}.")],
    end: Annotated[str, typer.Argument(help="The fine-tuned one, whose head and other files are taken.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the job's settings, with --evaluate.")
    ] = None,
    alpha: Annotated[str, typer.Option(help=_ALPHA)] = "0.5",
    output: Annotated[Path, typer.Option("--output", "-o", help="Gets an alpha-... for each.")] = Path(
        "interpolated"
    ),
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors that stay as in the second checkpoint.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="A job's YAML file: score each on its sets, in one process; reuses what exists."),
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="With --evaluate: keep no checkpoint.")
    ] = False,
) -> None:
    """Write (1 - alpha) * START + alpha * END of the weights (WiSE-FT), for each alpha."""
    if evaluate is None and (scores_only or settings):
        what = "--scores-only" if scores_only else f"{' '.join(settings or ())}: a setting of a job"
        raise ConfigError(f"{what} goes with --evaluate JOB.yaml")
    alphas = parse_alphas(alpha)
    there = [a for a in alphas if folder_of(output, a).exists()]
    if evaluate is None:
        _refuse(output, there)
    plan = work.plan(start, end, keep=tuple(keep or ()))
    _refuse(output, [a for a in there if not is_same(folder_of(output, a), plan.origin, a)])
    if plan.kept:
        print(f"as in {end} at every alpha: {some(plan.kept)}", file=sys.stderr)
    if plan.left_out:
        print(f"left out, {end} has no such tensor: {some(plan.left_out)}", file=sys.stderr)
    if plan.beside.left:
        print(f"not taken from beside {end}: {some(plan.beside.left)}", file=sys.stderr)
    with _ending_on_sigterm():
        if evaluate is None:
            for a in alphas:
                print(f"wrote {_write(plan, output, a)}")
        else:
            _score_all(plan, output, alphas, evaluate, settings or (), stay=not scores_only)


def _refuse(output: Path, alphas: Sequence[float]) -> None:
    if alphas:
        folders = some([str(folder_of(output, a)) for a in alphas])
        raise ConfigError(f"{folders}: there already; name another --output, or remove it first")


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that no partial checkpoint stays; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(plan: work.Plan, output: Path, alpha: float) -> Path:
    with showing(f"alpha {alpha:g}", total=plan.num_bytes) as progress:
        return work.write(plan, folder_of(output, alpha), alpha, progress)


def _score_all(
    plan: work.Plan, output: Path, alphas: Sequence[float], job: Path, settings: Sequence[str], *, stay: bool
) -> None:
    from sharded_spd.finetune.report.score_file import Scored, ScoreFile
    from sharded_spd.finetune.run.job import quiet_libraries
    from sharded_spd.finetune.run.resume import FREE
    from sharded_spd.finetune.run.score import Scorer

    quiet_libraries()
    config = load_job(job, settings)
    scorer = Scorer(config)
    metric = scorer.metrics[0]
    of = {**plan.origin.to_dict(), "job": {k: v for k, v in asdict(config).items() if k not in FREE}}
    scores = ScoreFile(output, of=of, metric=metric.name, percent=metric.percent)
    scorer.prepare(plan.end.folder)  # before anything large is written
    for alpha in alphas:
        folder = folder_of(output, alpha)
        there = folder.exists()
        try:
            if there:
                print(f"{folder}: there already, the same", file=sys.stderr)
            else:
                _write(plan, output, alpha)
            scores.add(Scored(alpha, scorer.score(folder)))
        finally:
            if not stay and not there:
                shutil.rmtree(folder, ignore_errors=True)
    _show(scores.rows, metric)
    print(f"wrote {output / 'scores.json'} and id_ood.png")


def _show(scored: Sequence[Scored], metric: Metric | UserMetric) -> None:
    digits = 1 if metric.percent else 3
    table = Table(title=f"{metric.name}{' in %' if metric.percent else ''}", title_justify="left")
    sets, kept = list(scored[0].scores.metrics), list(scored[0].scores.retained)
    for title in ("alpha", *sets, "mean OOD", *(f"retained: {name}" for name in kept)):
        table.add_column(title, justify="right")
    for row in scored:
        values = [row.scores.metrics[name][metric.name] for name in sets] + [row.scores.ood]
        values += [row.scores.retained[name] for name in kept]
        table.add_row(f"{row.alpha:g}", *("-" if v != v else f"{v:.{digits}f}" for v in values))
    Console().print(table)
