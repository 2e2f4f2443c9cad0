"""`sharded-spd interpolate`: checkpoints between a pre-trained and a fine-tuned one, and their scores."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sharded_spd.anchors import interpolate as work
from sharded_spd.anchors.paths import some
from sharded_spd.cli.progress import showing
from sharded_spd.errors import ConfigError
from sharded_spd.integrations.finetune.config import load_job

_PATH = "a safetensors file, an index, a directory, or a name in the hub's local cache"


def interpolate(
    start: Annotated[str, typer.Argument(help=f"The pre-trained checkpoint: {_PATH}.")],
    end: Annotated[str, typer.Argument(help="The fine-tuned one, whose head and other files are taken.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings on top of the job's, with --evaluate.")
    ] = None,
    alpha: Annotated[
        str, typer.Option(help="0: the first, 1: the second. 0.5, or 0.3,0.5, or 0:1:0.1.")
    ] = "0.5",
    output: Annotated[Path, typer.Option("--output", "-o", help="Gets an alpha-... for each.")] = Path(
        "interpolated"
    ),
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors that stay as in the second checkpoint.")
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="A job's YAML file: score each on its sets, in one process.")
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="With --evaluate: no checkpoint stays.")
    ] = False,
) -> None:
    """Write (1 - alpha) * START + alpha * END of the weights (WiSE-FT), for each alpha."""
    if evaluate is None and (scores_only or settings):
        what = "--scores-only" if scores_only else f"{' '.join(settings or ())}: a setting of a job"
        raise ConfigError(f"{what} goes with --evaluate JOB.yaml")
    alphas = work.parse_alphas(alpha)
    there = [str(work.folder_of(output, a)) for a in alphas if work.folder_of(output, a).exists()]
    if there:
        raise ConfigError(f"{some(there)}: there already; name another --output, or remove it first")
    plan = work.plan(start, end, keep=tuple(keep or ()))
    if plan.kept:
        print(f"as in {end} at every alpha: {some(plan.kept)}", file=sys.stderr)
    if plan.left_out:
        print(f"left out, {end} has no such tensor: {some(plan.left_out)}", file=sys.stderr)
    if evaluate is None:
        for a in alphas:
            print(f"wrote {_write(plan, output, a)}")
    else:
        _score_all(plan, output, alphas, evaluate, settings or (), stay=not scores_only)


def _write(plan: work.Plan, output: Path, alpha: float) -> Path:
    with showing(f"alpha {alpha:g}", total=plan.num_bytes) as progress:
        return work.write(plan, work.folder_of(output, alpha), alpha, progress)


def _score_all(
    plan: work.Plan, output: Path, alphas: Sequence[float], job: Path, settings: Sequence[str], *, stay: bool
) -> None:
    from sharded_spd.integrations.finetune.job import quiet_libraries
    from sharded_spd.integrations.finetune.score import Scored, Scorer, write_scores

    quiet_libraries()
    scorer = Scorer(load_job(job, settings))
    scored = []
    for alpha in alphas:
        folder = _write(plan, output, alpha)
        try:
            scored.append(Scored(alpha, scorer.score(folder)))
        finally:
            if not stay:
                shutil.rmtree(folder, ignore_errors=True)
    metric = scorer.metrics[0]
    write_scores(scored, output, metric=metric.name, percent=metric.percent)
    digits = 1 if metric.percent else 3
    table = Table(title=f"{metric.name}{' in %' if metric.percent else ''}", title_justify="left")
    sets = list(scored[0].scores.metrics)
    for title in ("alpha", *sets, "mean OOD"):
        table.add_column(title, justify="right")
    for row in scored:
        values = [row.scores.metrics[name][metric.name] for name in sets] + [row.scores.ood]
        table.add_row(f"{row.alpha:g}", *("-" if v != v else f"{v:.{digits}f}" for v in values))
    Console().print(table)
    print(f"wrote {output / 'scores.json'} and id_ood.png")
