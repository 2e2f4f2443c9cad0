"""A probe model on an engine, trained by the package; its loss makes gradients exactly as given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.projection.projector import Projector
from tests.reference.oracle import LayerOptions
from tests.support.engines import Engine
from tests.support.models import Probe

Form = Literal["adam_spd", "attached"]
FORMS: tuple[Form, ...] = ("adam_spd", "attached")


class Training:
    """Wraps a probe of `tensors` on `engine` and makes its optimizer.

    `options` is one for all layers or one by name. `form` is how the package is used: `AdamSPD`, or `attach`
    to torch's Adam. The layers of `leave_out` are not given to the optimizer. `make_base` replaces that Adam:
    it takes param groups with lr, betas and eps. `extra` goes to the optimizer.
    """

    def __init__(
        self,
        engine: Engine,
        tensors: Mapping[str, Tensor],
        options: LayerOptions | Mapping[str, LayerOptions],
        *,
        form: Form = "adam_spd",
        anchor: Any = "snapshot",
        ties: Mapping[str, str] | None = None,
        frozen: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        make_base: Callable[..., torch.optim.Optimizer] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
        give_model: bool = False,
        **extra: Any,
    ) -> None:
        self.engine = engine
        model = Probe(tensors, ties=ties)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        self.model = engine.wrap(model)
        if prepare is not None:
            prepare(self.model)
        self.params = engine.named(self.model)
        self.stepped = {
            n: p for n, p in self.params.items() if not set(leave_out).issuperset(engine.layers(n))
        }
        self.options = {
            name: options if isinstance(options, LayerOptions) else options[name]
            for param in self.stepped
            for name in engine.layers(param)
        }
        if (give_model or engine.needs_model) and form == "adam_spd":
            extra["model"] = self.model
        self.optimizer, self.projector = self._optimizer(form, anchor, make_base, extra)
        self.steps = 0

    def _optimizer(
        self,
        form: Form,
        anchor: Any,
        make_base: Callable[..., torch.optim.Optimizer] | None,
        extra: dict[str, Any],
    ) -> tuple[torch.optim.Optimizer, Projector]:
        own = {name: self._option_of(name, form) for name in self.stepped}
        if form == "adam_spd":
            make = partial(AdamSPD, anchor=anchor, **extra)
            optimizer, self.model = self.engine.optimizer(
                self.model, make, adam_spd_groups(self.stepped, own)
            )
            inner = getattr(optimizer, "optim", optimizer)
            return optimizer, inner.projector
        optimizer, self.model = self.engine.optimizer(
            self.model, make_base or torch.optim.Adam, base_groups(self.stepped, own), **extra
        )
        return optimizer, attach(optimizer, self.model, config_of(self.options, anchor))

    def _option_of(self, param: str, form: Form) -> LayerOptions:
        """Of all layers in a parameter: they have to agree in what the optimizer is told."""
        first, *others = (self.options[name] for name in self.engine.layers(param))
        for other in others:
            told = first == other if form == "adam_spd" else _base_key(first) == _base_key(other)
            assert told, f"{param} holds layers of different options"
        return first

    def backward(self, grads: Mapping[str, Tensor], *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Makes these gradients by the engine's own backward; one data-parallel rank supplies them."""
        index, count = self.engine.data_parallel
        weight = float(count) if self.steps % count == index else 0.0
        loss = self.model(dict(grads)) * weight
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Backward, optimizer step, gradients dropped."""
        self.backward(grads)
        self.update()

    def update(self) -> None:
        """Optimizer step, gradients dropped."""
        self.optimizer.step()
        self.engine.zero_grad(self.model, self.optimizer)
        self.steps += 1

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradients that the optimizer will see; collective."""
        return self.engine.gradients(self.params)

    def weights(self) -> dict[str, Tensor]:
        """The whole layers; collective."""
        return self.engine.weights(self.params)


def _base_key(options: LayerOptions) -> tuple[Any, ...]:
    return options.lr, options.betas, options.eps


def adam_spd_groups(
    params: Mapping[str, nn.Parameter], options: Mapping[str, LayerOptions]
) -> list[dict[str, Any]]:
    """Groups of named parameters with equal options, in the order of their first parameter."""
    groups: dict[LayerOptions, list[tuple[str, nn.Parameter]]] = {}
    for name, p in params.items():
        groups.setdefault(options[name], []).append((name, p))
    return [
        {
            "params": pairs,
            "lr": o.lr,
            "betas": o.betas,
            "eps": o.eps,
            "weight_decay": o.weight_decay,
            "rule": o.rule,
            "max_pull": o.max_pull,
        }
        for o, pairs in groups.items()
    ]


def base_groups(
    params: Mapping[str, nn.Parameter], options: Mapping[str, LayerOptions]
) -> list[dict[str, Any]]:
    """The same for an optimizer that knows nothing of rules; parameters without names."""
    groups = adam_spd_groups(params, options)
    for group in groups:
        group["params"] = [p for _, p in group["params"]]
        for key in ("weight_decay", "rule", "max_pull"):
            del group[key]
    return groups


def config_of(options: Mapping[str, LayerOptions], anchor: Any = "snapshot") -> SPDConfig:
    """One entry per layer, by its escaped name."""
    layers = tuple(
        LayerConfig(pattern=re.escape(name), rule=o.rule, weight_decay=o.weight_decay, max_pull=o.max_pull)
        for name, o in options.items()
    )
    source = anchor if isinstance(anchor, AnchorConfig) else AnchorConfig(source=anchor)
    return SPDConfig(anchor=source, layers=layers)


def anchor_file(engine: Engine, tensors: Mapping[str, Tensor]) -> str:
    """The path of a safetensors file of these tensors, written once and seen by all ranks."""
    path = Path(engine.scratch) / "anchor.safetensors"
    if engine.rank == 0:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    dist.barrier()
    return str(path)
