"""One rank of one case: build the variants, alternate them step by step, tell what was seen."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bench.case import BASELINES, Case, held_bytes, least_bytes
from bench.clocks import AllReduceWatch, Stopwatch, Wire
from bench.gradients import Gradients, local
from bench.holder import initial_values
from bench.machine import MemoryWatch, free_memory
from bench.shapes import Block, make_blocks
from bench.variants import Runner, compare, make, make_model, unsuited
from torch import Tensor

REARM = 8
"""Rounds between two unmeasured steps that renew the momentum."""


@dataclass
class Seen:
    """What was measured of one variant: a time per round that it took part in."""

    seconds: dict[int, float] = field(default_factory=dict)
    waiting: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    record: dict[str, Any] = field(default_factory=dict)


def run_case(rank: int, folder: Path, case: Case) -> dict[str, Any]:
    """Measure one case; what comes back is the same on all ranks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    if case.ranks > 1:
        backend = "nccl" if case.device == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks
        )
    blocks = make_blocks(case.shape, case.parameters, case.layers)
    skipped = [f"{name}: {why}" for name in case.variants if (why := unsuited(name, case))]
    names = [name for name in case.variants if unsuited(name, case) is None]
    anchor_file = _write_anchor(folder, blocks, case, rank)
    gradients = Gradients(list(make_model(blocks, case).parameters()), case.pulled, rank)
    batches, too_large = _batches(names, case)
    skipped += too_large
    results: list[dict[str, Any]] = []
    _warm_up(names, case)
    for batch in batches:
        found, failures = _run_batch(batch, case, blocks, anchor_file, gradients)
        results += found
        skipped += failures
        gc.collect()
    if case.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {"variants": _merge(results), "skipped": skipped}


def _warm_up(names: Sequence[str], case: Case) -> None:
    """Have libraries loaded and kernels compiled before memory is looked at."""
    blocks = make_blocks("layered", 1000, 4)
    tiny = replace(case, parameters=1000, anchor_dtype=case.dtype, anchor_place="weights")
    gradients = Gradients(list(make_model(blocks, tiny).parameters()), 0.5, 0)
    for name in names:
        runner = make(name, tiny, blocks, None)
        gradients.give(runner.params)
        for away in (True, True, False):
            gradients.set_away(away)
            with runner.around():
                runner.step()


def _write_anchor(folder: Path, blocks: list[Block], case: Case, rank: int) -> Path | None:
    """The initial weights as a file, where a snapshot will not do."""
    if case.anchor_dtype == case.dtype and case.anchor_place in ("weights", "cpu"):
        return None
    from safetensors.torch import save_file

    path = folder / "anchor.safetensors"
    if rank == 0:
        dtype = getattr(torch, case.anchor_dtype)
        values: dict[str, Tensor] = {}
        for i, block in enumerate(initial_values(blocks, dtype, torch.device("cpu"))):
            values.update({f"blocks.{i}.{name}": value for name, value in block.items()})
        save_file(values, str(path))
    if case.ranks > 1:
        dist.barrier()
    return path


def _batches(names: Sequence[str], case: Case) -> tuple[list[list[str]], list[str]]:
    """Variants that fit into memory together, each batch with the baselines; and what does not fit."""
    share = -(-case.parameters // case.ranks)
    room = 0.75 * free_memory(case.device) / (1 if case.device == "cuda" else case.ranks)
    room = float(_everywhere([room], min, case.ranks)[0])
    base = [name for name in BASELINES if name in names]
    own = sum(held_bytes(name, case) for name in base) * share + 2**29
    batches, skipped, used = [list(base)], [], own
    for name in names:
        need = held_bytes(name, case) * share
        if name in base:
            continue
        if own + need > room:
            skipped.append(f"{name}: needs {(own + need) / 2**30:.1f} GiB, {room / 2**30:.1f} GiB to be used")
        elif used + need > room:
            batches.append([*base, name])
            used = own + need
        else:
            batches[-1].append(name)
            used += need
    if own > room:
        return [], [f"all: {own / 2**30:.1f} GiB needed, {room / 2**30:.1f} GiB to be used"]
    return batches, skipped


def _run_batch(
    names: Sequence[str], case: Case, blocks: list[Block], anchor_file: Path | None, gradients: Gradients
) -> tuple[list[dict[str, Any]], list[str]]:
    runners, seen, failures = [], {}, []
    for name in names:
        with MemoryWatch(case.device) as memory:
            runner = make(name, case, blocks, anchor_file)
            gradients.give(runner.params)
            gradients.set_away(True)
            # Two steps away from the anchor, and one as they will be measured.
            for away in (True, True, False):
                gradients.set_away(away)
                with runner.around():
                    runner.step()
        if name == "adamspd_graph":
            try:
                _capture(runner)
            except RuntimeError as error:
                failures.append(f"{name}: cannot be captured: {str(error).splitlines()[0]}")
                continue
        runners.append(runner)
        seen[name] = Seen(held=memory.held, peak=memory.peak)
    differences = compare(runners)
    _alternate(runners, seen, gradients, case)
    pulled = [local(g).numel() for g, own in zip(gradients.tensors, gradients.pulled, strict=True) if own]
    elements = sum(local(g).numel() for g in gradients.tensors)
    results = []
    for runner in runners:
        record = _finish(runner, seen[runner.name], seen, case, sum(pulled) / elements)
        _count(runner, record, case)
        if runner.pulled is not None:
            record["layers_pulled"] = runner.pulled()
            record["layers_to_be_pulled"] = sum(gradients.pulled)
            worst = _everywhere([differences[runner.name]], max, case.ranks)[0]
            record["difference_from_adamspd_fused"] = worst
        results.append(record)
    for runner in runners:
        for p in runner.params:
            p.grad = None
    return results, failures


def _alternate(runners: Sequence[Runner], seen: dict[str, Seen], gradients: Gradients, case: Case) -> None:
    """Rounds of one step of each; the order turns, and a variant that is very slow sits out most rounds."""
    watch = Stopwatch(case.device)
    spent, every = 0.0, dict.fromkeys(seen, 1)
    for number in range(case.max_rounds):
        if number % REARM == REARM - 1:
            gradients.set_away(True)
            for runner in runners:
                with runner.around():
                    runner.step()
            gradients.set_away(False)
        turn = number % len(runners)
        round_seconds = 0.0
        for runner in [*runners[turn:], *runners[:turn]]:
            if number % every[runner.name]:
                continue
            own, most, least = _timed_step(runner, watch, case)
            seen[runner.name].seconds[number] = own
            seen[runner.name].waiting.append(most)
            seen[runner.name].exposed.append(least)
            round_seconds += own
            if number == 0:
                every[runner.name] = max(
                    1, min(case.min_rounds - 1, round(own * 4 * len(runners) / case.seconds))
                )
        spent += round_seconds
        if number + 1 >= case.min_rounds and spent > case.seconds:
            break


def _timed_step(runner: Runner, watch: Stopwatch, case: Case) -> tuple[float, float, float]:
    """Seconds of the slowest rank, and the most and the least that one spent in all-reduces.

    The least is that of the rank which came last, and waited for no other: the collective itself.
    """
    with runner.around(), AllReduceWatch(watch) as reduces:
        if case.ranks > 1:
            dist.barrier()
        if case.device == "cuda":
            torch.cuda.synchronize()
        begin = watch.start()
        runner.step()
        own = watch.seconds(watch.stop(begin))
    waited = reduces.seconds()
    slowest, most = _everywhere([own, waited], max, case.ranks)
    (least,) = _everywhere([waited], min, case.ranks)
    return slowest, most, least


def _everywhere(values: list[float], how: Any, ranks: int) -> list[float]:
    """`how` over the ranks, of each of the numbers."""
    if ranks == 1:
        return values
    gathered: list[list[float]] = [[] for _ in range(ranks)]
    dist.all_gather_object(gathered, values)
    return [how(column) for column in zip(*gathered, strict=True)]


def _finish(
    runner: Runner, own: Seen, seen: dict[str, Seen], case: Case, pulled_elements: float
) -> dict[str, Any]:
    """The figures of a variant; ratios are medians over the rounds that both took part in."""
    share = case.parameters / case.ranks
    seconds = median(own.seconds.values())
    record: dict[str, Any] = {
        "name": runner.name,
        "rounds": len(own.seconds),
        "seconds": seconds,
        "seconds_spread": [min(own.seconds.values()), max(own.seconds.values())],
        "nanoseconds_per_parameter": seconds / share * 1e9,
        "waiting_for_all_reduce_seconds": median(own.waiting),
        "exposed_all_reduce_seconds": median(own.exposed),
        "held_bytes_per_parameter": own.held / share if runner.params else None,
        "peak_bytes_per_parameter": own.peak / share if runner.params else None,
        "least_bytes_per_parameter": least_bytes(runner.name, case, pulled_elements),
    }
    for baseline, key in (("adamw_fused", "ratio_to_adamw_fused"), ("copy", "ratio_to_copy")):
        other = seen.get(baseline)
        if other is None:
            continue
        both = own.seconds.keys() & other.seconds.keys()
        record[key] = median(own.seconds[i] / other.seconds[i] for i in both)
    if "ratio_to_copy" in record:
        record["bytes_per_parameter_at_copy_speed"] = 7 * case.item_bytes * record["ratio_to_copy"]
    return record


def _count(runner: Runner, record: dict[str, Any], case: Case) -> None:
    """One more step, not timed: what it sends, and on a GPU whether the host waits."""
    with runner.around(), Wire() as wire:
        if case.ranks > 1:
            dist.barrier()
        runner.step()
    record["collectives"] = wire.calls
    record["all_reduces"] = wire.all_reduces
    record["payload_bytes"] = wire.payload_bytes
    waited = record["waiting_for_all_reduce_seconds"] + wire.seconds
    record["collective_share"] = min(1.0, _everywhere([waited], max, case.ranks)[0] / record["seconds"])
    exposed = record["exposed_all_reduce_seconds"] + _everywhere([wire.seconds], min, case.ranks)[0]
    record["exposed_share"] = min(1.0, exposed / record["seconds"])
    if case.device == "cuda":
        record["host_waits"] = _sync_check(runner)


def _sync_check(runner: Runner) -> str | None:
    """What made the host wait for the GPU, None where nothing did."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with runner.around():
            runner.step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def _capture(runner: Runner) -> None:
    """Replace the step by the replay of its CUDA graph."""
    side, graph, eager = torch.cuda.Stream(), torch.cuda.CUDAGraph(), runner.step
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        eager()
    runner.step = graph.replay


def _merge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Baselines that were in several batches once: the fastest of them."""
    merged: dict[str, dict[str, Any]] = {}
    for record in results:
        known = merged.get(record["name"])
        if known is None or record["seconds"] < known["seconds"]:
            merged[record["name"]] = record
    return list(merged.values())
