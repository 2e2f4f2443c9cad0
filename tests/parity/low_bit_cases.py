"""The rule around optimizers that keep their state in 8 or 4 bits; each function runs on every rank.

Such a base quantizes its state in blocks of 128 or 256 consecutive elements of the tensor that it is handed,
which under FSDP2 is the shard. The shapes below give every one of two ranks whole blocks, so that a shard's
blocks are those of the whole layer, and the base of one process keeps the same bits; `own_blocks` has shards
of other sizes, and compares with a base that is handed the same rows in one process. No rounding is random.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.parity.cases import gradients, tensors
from tests.reference.oracle import BaseOracle, LayerOptions
from tests.support.compare import assert_bits_equal, assert_float32_parity, assert_layers_close
from tests.support.engines import Engine
from tests.support.training import Training, anchor_file, base_groups

SPD = LayerOptions(lr=0.02, weight_decay=1.5)

OPTIONS = {
    "embed.weight": SPD,
    "block.attn.weight": replace(SPD, lr=0.01, weight_decay=0.7),
    "block.attn.bias": replace(SPD, weight_decay=20.0, max_pull=0.25),
    "block.mlp.weight": replace(SPD, weight_decay=2.0, rule="l2sp"),
}
SHAPES = {
    "embed.weight": (128, 64),
    "block.attn.weight": (64, 4, 32),
    "block.attn.bias": (66,),
    "block.mlp.weight": (256, 64),
}
"""Both libraries leave tensors below 4096 elements in float32, as the bias here: half a weight has 4096."""
LOW = ("embed.weight", "block.attn.weight", "block.mlp.weight")
LEFT_OVER = {"embed.weight": (129, 64), "block.attn.weight": (66, 128), "block.attn.bias": (3,)}
"""Two ranks' shards of these end inside a block of the whole layer."""

WITHOUT = {"bitsandbytes.Lion8bit": ("eps",), "bitsandbytes.SGD8bit": ("eps", "betas")}
"""The settings of Adam that a base does not take."""
MORE: dict[str, dict[str, Any]] = {
    "bitsandbytes.AdEMAMix8bit": {"betas": (0.9, 0.999, 0.99)},
    "bitsandbytes.SGD8bit": {"momentum": 0.9},
}


class Base:
    """Makes the optimizer `name`, "library.Class", without a decay of its own."""

    def __init__(self, name: str) -> None:
        self._library, _, self._kind = name.partition(".")
        self._without, self._more = WITHOUT.get(name, ()), MORE.get(name, {})

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """Of these param groups."""
        kind = getattr(importlib.import_module(f"{self._library}.optim"), self._kind)
        taken = [
            {k: v for k, v in group.items() if k not in (*self._without, *self._more)} for group in groups
        ]
        return kind(taken, lr=taken[0]["lr"], weight_decay=0.0, **self._more)

    def oracle(
        self,
        start: Mapping[str, Tensor],
        anchors: Mapping[str, Tensor],
        options: Mapping[str, LayerOptions],
        parts: int = 1,
    ) -> BaseOracle:
        """The same base in one process, handed the layers cut into so many blocks of rows."""

        def make(params: dict[str, nn.Parameter]) -> Any:
            if parts == 1:
                return self(base_groups(params, options))
            return _InParts(
                params, parts, lambda cut, of: self(base_groups(cut, {n: options[of[n]] for n in cut}))
            )

        return BaseOracle(start, anchors, options, make)


class _InParts:
    """Steps an optimizer on the blocks of rows that FSDP2's ranks hold, in the layers' own memory."""

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        parts: int,
        make: Callable[[dict[str, nn.Parameter], dict[str, str]], torch.optim.Optimizer],
    ) -> None:
        self._params, self._parts = params, parts
        self._cut = {
            f"{name}/{i}": nn.Parameter(rows)
            for name, p in params.items()
            for i, rows in enumerate(p.detach().chunk(parts))
        }
        self.optimizer = make(self._cut, {name: name.rpartition("/")[0] for name in self._cut})

    def step(self) -> None:
        """One step of the layers that have a gradient."""
        for name, p in self._params.items():
            for i in range(self._parts):
                grad = None if p.grad is None else p.grad.chunk(self._parts)[i].clone()
                self._cut[f"{name}/{i}"].grad = grad
        self.optimizer.step()


@contextmanager
def running(compiled: bool) -> Iterator[None]:
    """Compiles what asks for it, or runs the same operations one by one, which saves minutes.

    No cache of compiled code is read: one keeps the layers' placement and not the kind of state inside, and
    gives the code for 8 bits to a state of 4.
    """
    with ExitStack() as stack:
        if compiled:
            settings = {"force_disable_caches": True, "compile_threads": 1}
            stack.enter_context(inductor.patch(settings))
        else:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def around(engine: Engine, *, base: str, compiled: bool = False, file: bool = False) -> None:
    """Rules of several kinds, layers without a gradient: the weights, and the bits of the base's state."""
    shapes = {"embed.weight": SHAPES["embed.weight"]} if compiled else SHAPES
    start = tensors(shapes, dtype=torch.float32)
    missing = {} if compiled else {2: ("block.attn.weight",), 4: ("embed.weight", "block.attn.bias")}
    anchors = tensors(shapes, dtype=torch.float32, seed=7) if file else start
    anchor = anchor_file(engine, anchors) if file else "snapshot"
    with running(compiled):
        training = Training(engine, start, OPTIONS, form="attached", anchor=anchor, make_base=Base(base))
        oracle = Base(base).oracle(start, anchors, OPTIONS)
        follow(training, oracle, gradients(start, 8, missing=missing))
        for name, p in training.params.items():
            state, plain = training.optimizer.state[p], oracle.base.state[oracle.params[name]]
            assert low_bit(state) == low_bit(plain) == (name in LOW and "32" not in base), f"{name}: {state}"
            assert_bits_equal(numbers(state), numbers(plain), label=f"{name}'s state:")


def own_blocks(engine: Engine, *, base: str) -> None:
    """Shards that end inside a block: the base steps each by itself, the rule sees the whole layer."""
    start = tensors(LEFT_OVER, dtype=torch.float32)
    with running(False):
        training = Training(engine, start, OPTIONS, form="attached", make_base=Base(base))
        oracle = Base(base).oracle(start, start, OPTIONS, parts=engine.world)
        follow(training, oracle, gradients(start, 8))
        # 65 rows of 64 end inside a block, so the base keeps float32 for them; the other 64 rows do not.
        state = training.optimizer.state[training.params["embed.weight"]]
        assert low_bit(state) == (engine.rank == 1)


def bfloat16(engine: Engine, *, base: str) -> None:
    """Weights in bfloat16: base and pull round to the nearest, apart by the last place of a few elements."""
    start = tensors({name: SHAPES[name] for name in LOW}, dtype=torch.bfloat16)
    with running(False):
        training = Training(engine, start, OPTIONS, form="attached", make_base=Base(base))
        oracle, pulled = Base(base).oracle(start, start, OPTIONS), 0
        for t, grads in enumerate(gradients(start, 6)):
            training.step(grads)
            pulled += sum(s.s != 0 for name, s in oracle.step(grads).items() if OPTIONS[name].rule == "spd")
            assert_layers_close(training.weights(), oracle.weights, relative=1e-4, label=f"step {t}:")
        assert pulled >= 3
        assert all(low_bit(state) for state in training.optimizer.state.values())


def scheduled(engine: Engine, *, base: str) -> None:
    """A learning rate that a scheduler changes, whether the base keeps it as a number or as a tensor."""
    start = tensors(SHAPES, dtype=torch.float32)
    options = dict.fromkeys(start, SPD)
    with running(False):
        training = Training(engine, start, options, form="attached", make_base=Base(base))
        oracle = Base(base).oracle(start, start, options)
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
            for optimizer in (training.optimizer, oracle.base)
        ]
        for t, grads in enumerate(gradients(start, 6)):
            training.step(grads)
            oracle.step(grads)
            for scheduler in schedulers:
                scheduler.step()
            assert_layers_close(training.weights(), oracle.weights, relative=2e-6, label=f"step {t}:")
        assert float(training.optimizer.param_groups[0]["lr"]) < 0.2 * SPD.lr


def resumed(engine: Engine, *, base: str) -> None:
    """State that the base saved and loads: the next steps have the same bits."""
    start = tensors(SHAPES, dtype=torch.float32)
    grads = gradients(start, 8)
    with running(False):
        first = Training(engine, start, OPTIONS, form="attached", make_base=Base(base))
        for given in grads[:4]:
            first.step(given)
        weights = {name: p.detach().clone() for name, p in first.params.items()}
        file = io.BytesIO()
        torch.save((first.optimizer.state_dict(), first.projector.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        second = Training(engine, start, OPTIONS, form="attached", make_base=Base(base))
        with torch.no_grad():
            for name, p in second.params.items():
                p.copy_(weights[name])
        second.optimizer.load_state_dict(saved[0])
        second.projector.load_state_dict(saved[1])
        second.steps = first.steps
        pulled = 0
        for given in grads[4:]:
            first.step(given)
            second.step(given)
            assert_bits_equal(second.weights(), first.weights())
            layers = second.projector.metrics()["layers"]
            pulled += sum(layer["s"] > 0 for name, layer in layers.items() if OPTIONS[name].rule == "spd")
        assert pulled >= 1
        for name in LOW:
            assert low_bit(second.optimizer.state[second.params[name]])


def refused(engine: Engine, *, base: str, kind: type[Exception], words: str, dtype: torch.dtype) -> None:
    """A base that cannot step such shards says so itself, with the rule as without; nothing has moved."""
    start = tensors(SHAPES, dtype=dtype)
    training = Training(engine, start, OPTIONS, form="attached", make_base=Base(base))
    assert set(training.projector.deviation()) == set(start)
    with running(False):
        for given in gradients(start, 2):
            training.backward(given)
            with pytest.raises(kind, match=words):
                training.optimizer.step()
            assert_bits_equal(training.weights(), start)
        assert training.projector.num_steps == 0
        training.projector.detach()
        with pytest.raises(kind, match=words):
            training.optimizer.step()


def follow(training: Training, oracle: BaseOracle, grads: Sequence[Mapping[str, Tensor]]) -> None:
    """Both take the same steps and agree to float32's rounding; SPD's condition has to have fired."""
    pulled = 0
    start = {name: w.clone() for name, w in oracle.weights.items()}
    for t, given in enumerate(grads):
        training.step(given)
        stats = oracle.step(given)
        pulled += sum(s.s != 0 for name, s in stats.items() if training.options[name].rule == "spd")
        assert_layers_close(training.weights(), oracle.weights, relative=2e-6, label=f"step {t}:")
        for name, layer in training.projector.metrics()["layers"].items():
            if name in stats:
                assert abs(layer["s"] - stats[name].s) <= 2e-5, (
                    f"step {t}, {name}: s {layer['s']} for {stats[name].s}"
                )
    assert_float32_parity(training.weights(), oracle.weights, start)
    assert pulled >= 3, f"the case pulls only {pulled} times and shows nothing"


def low_bit(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is kept in bytes or less."""
    parts = [v.to_local() if isinstance(v, DTensor) else v for v in state.values() if isinstance(v, Tensor)]
    return any(getattr(part, "codes", part).itemsize == 1 for part in parts)


def numbers(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state as it is kept, whole and as plain tensors; collective."""
    result = {}
    for key, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        parts = {f"{key}.{name}": getattr(local, name) for name in ("codes", "scale") if hasattr(local, name)}
        for name, part in (parts or {key: torch.as_tensor(local)}).items():
            if part.dtype == torch.float8_e4m3fn:
                part = part.view(torch.uint8)  # neither torch.equal nor gloo takes float8
            result[name] = _joined(part) if isinstance(value, DTensor) else part
    return result


def _joined(rows: Tensor) -> Tensor:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, rows)
    return torch.cat(every)
