"""The optimizers that are measured, each with weights, state and anchors of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.case import SPD, Case
from bench.gradients import local
from bench.holder import Holder
from bench.peers import BETAS, EPS, Copy, NaiveDTensor, PublishedLoop
from bench.shapes import Block
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

LR, DECAY = 1e-3, 1.0
SWITCH = "SHARDED_SPD_KERNELS"


@dataclass
class Runner:
    """A variant, ready to step. `around` surrounds each step, and is not timed."""

    name: str
    params: list[Parameter]
    step: Callable[[], Any]
    pulled: Callable[[], int] | None = None
    around: Callable[[], Any] = nullcontext


def unsuited(name: str, case: Case) -> str | None:
    """Why a variant is left out of a case; None where it belongs."""
    if name == "published" and case.ranks > 1:
        return "the published loop cannot see a layer that is split over ranks (naive_dtensor stands for it)"
    if name in ("published", "naive_dtensor") and case.anchor_place != "weights":
        return f"{name} keeps its anchors with the weights"
    if name in ("adamspd_fused", "adamspd_reference") and case.anchor_place == "cpu":
        return "AdamSPD has no setting for anchors in host memory; attach has"
    if name == "adamspd_graph" and (
        case.device != "cuda" or case.ranks > 1 or case.anchor_place != "weights"
    ):
        return "CUDA graphs need one GPU and anchors on it"
    return None


def make_model(blocks: list[Block], case: Case) -> Holder:
    """The weights of one variant, sharded by `fully_shard` where there are several ranks."""
    model = Holder(blocks, getattr(torch, case.dtype), torch.device(case.device))
    if case.ranks > 1:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def make(name: str, case: Case, blocks: list[Block], anchor_file: Path | None) -> Runner:
    """One variant; `anchor_file` holds the initial weights in the anchors' dtype."""
    if name == "copy":
        shapes = [p.numel() for block in blocks for p in _meta(block)]
        copier = Copy(7 * case.item_bytes * sum(shapes) // case.ranks, torch.device(case.device))
        return Runner(name, [], copier.step)
    model = make_model(blocks, case)
    named = list(model.named_parameters())
    params = [p for _, p in named]
    common: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS}
    if name in ("adamw_fused", "adamw_foreach"):
        how = {"fused": True} if name == "adamw_fused" else {"foreach": True}
        return Runner(name, params, torch.optim.AdamW(params, **common, **how).step)
    if name in ("naive_dtensor", "published"):
        anchors = [_like(p, case) for p in params]
        peer = (PublishedLoop if name == "published" else NaiveDTensor)(params, anchors, LR, DECAY)
        return Runner(name, params, peer.step, lambda: peer.num_pulled)
    if name == "attach_fused":
        return _attached(params, model, case, anchor_file, common)
    return _adamspd(name, named, case, anchor_file, common)


def _adamspd(
    name: str,
    named: list[tuple[str, Parameter]],
    case: Case,
    anchor_file: Path | None,
    common: dict[str, Any],
) -> Runner:
    from sharded_spd import AdamSPD
    from sharded_spd.anchors import FileAnchor, MappedAnchor

    store = MappedAnchor if case.anchor_place == "disk" else FileAnchor
    anchor: Any = "snapshot" if anchor_file is None else store(str(anchor_file))
    graph = name == "adamspd_graph"
    around = partial(reference_kernels, case.device) if name == "adamspd_reference" else nullcontext
    with around():
        optimizer = AdamSPD(named, **common, weight_decay=DECAY, fused=True, capturable=graph, anchor=anchor)
    step: Callable[[], Any] = optimizer.step
    params = [p for _, p in named]
    return Runner(name, params, step, lambda: _num_pulled(optimizer.projector), around)


def _attached(
    params: list[Parameter], model: Holder, case: Case, anchor_file: Path | None, common: dict[str, Any]
) -> Runner:
    from sharded_spd import SPDConfig, attach
    from sharded_spd.config import AnchorConfig

    base = torch.optim.AdamW(params, **common, weight_decay=0.0, fused=True)
    device = "auto" if case.anchor_place == "weights" else case.anchor_place
    source = "snapshot" if anchor_file is None else str(anchor_file)
    config = SPDConfig(weight_decay=DECAY, anchor=AnchorConfig(source=source, device=device))
    projector = attach(base, model, config)
    # The model has to live as long as its runner: the package holds it weakly.
    return Runner("attach_fused", params, base.step, lambda m=model: _num_pulled(projector))


def _num_pulled(projector: Any) -> int:
    return sum(layer["s"] > 0 for layer in projector.metrics()["layers"].values())


def _meta(block: Block) -> list[Tensor]:
    return [torch.empty(shape, device="meta") for shape in block.values()]


def _like(p: Parameter, case: Case) -> Tensor:
    """A copy of a weight in the anchors' dtype, a DTensor where it is one."""
    dtype = getattr(torch, case.anchor_dtype)
    copied = local(p).to(dtype, copy=True)
    if not isinstance(p, DTensor):
        return copied
    return DTensor.from_local(
        copied, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


@contextmanager
def reference_kernels(device: str = "cpu") -> Iterator[None]:
    """Plain torch in place of the compiled kernels; the package's choice is made anew on both ends."""
    before = os.environ.get(SWITCH)

    def choose(value: str | None) -> None:
        os.environ.pop(SWITCH, None) if value is None else os.environ.__setitem__(SWITCH, value)
        for module in [m for n, m in sys.modules.items() if n.startswith("sharded_spd.kernels")]:
            for kept in vars(module).values():
                if callable(getattr(kept, "cache_clear", None)):
                    kept.cache_clear()
        # Asked for here, so that no timed step of another variant has to find its kernels again.
        if kernels_for(device).name != "reference" and value == "reference":
            raise RuntimeError(f"{SWITCH}={value} was not followed")

    from sharded_spd.kernels.choose import kernels_for

    choose("reference")
    try:
        yield
    finally:
        choose(before)


def compare(runners: Sequence[Runner]) -> dict[str, float]:
    """How far each projecting variant's weights are from adamspd_fused's: |difference| / |weights|.

    Of the local shards; the worst layer. NaN-free only if the weights are.
    """
    own = {r.name: r for r in runners if r.name in (*SPD, "adamspd_graph")}
    first = own.get("adamspd_fused") or next(iter(own.values()), None)
    result = {}
    for name, runner in own.items():
        worst = 0.0
        for p, q in zip(runner.params, first.params, strict=True):
            a, b = local(p).float(), local(q).float()
            if a.numel():
                worst = max(worst, float((a - b).norm() / b.norm()))
        result[name] = worst
    return result
