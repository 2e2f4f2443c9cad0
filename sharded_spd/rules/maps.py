"""MAPS (arXiv 2511.19878, CVPR 2026): SPD whose strength falls with depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.errors import ConfigError
from sharded_spd.rules.base import LayerInfo, Options, RuleSpec, Stats
from sharded_spd.rules.check import check_range
from sharded_spd.rules.spd import SPD
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA


@dataclass(frozen=True, slots=True)
class MAPS(SPD):
    """SPD with lambda_k = lambda * (first + (last - first) * k / (K - 1)), 0 for biases and new heads.

    An interpretation: a layer is one parameter, k its place (from 0) among the model's K parameters without
    biases and heads, in the model's order; a bias is what is named so. Without the model, the order is
    that of the optimizer's param groups. A stage of a pipeline cannot tell how deep
    it lies, and needs `order`.

    Args:
        first: share of lambda at the first layer.
        last: share of lambda at the last one.
        heads: regular expression that new heads match as a whole (`re.fullmatch`); None: there are none.
        order: the names of all the model's layers in its order; None: as the model at hand has them.
    """

    first: float = 1.0
    last: float = 0.0
    heads: str | None = None
    order: Sequence[str] | None = field(default=None, repr=False)
    order_digest: str = field(default="", init=False)
    name: ClassVar[str] = "maps"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA, DELTA_SQ), after=(DELTA_SQ,), layer_state=("share",)
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a share below 0, or a pattern that is none."""
        check_range(self.name, "first", self.first, least=0.0)
        check_range(self.name, "last", self.last, least=0.0)
        try:
            re.compile(self.heads or "")
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"got heads={self.heads!r} for rule 'maps'; wanted a regular expression: {error}"
            ) from None
        if self.order is None:
            return
        names = () if isinstance(self.order, str) else tuple(self.order)
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"got order={str(self.order)[:100]!r} for rule 'maps'; wanted a list of the names of all the "
                "model's layers, each once: [name for name, _ in model.named_parameters()]"
            )
        object.__setattr__(self, "order", names)
        # Ranks compare this in place of the names, for each layer.
        object.__setattr__(self, "order_digest", sha256("\n".join(names).encode()).hexdigest()[:16])

    def prepare(self, layers: Sequence[LayerInfo]) -> Mapping[str, Tensor]:
        """Each layer's share of lambda, `[num_layers]`.

        Raises:
            ConfigError: where the order of the model's layers is not known.
        """
        order = self.order or (layers[0].order if layers else ())
        deep = {fqn: k for k, fqn in enumerate(fqn for fqn in order if self._counts(fqn))}
        shares = []
        for layer in layers:
            if self._counts(layer.fqn) and layer.fqn not in deep:
                raise ConfigError(
                    f"rule 'maps' does not know where layer {layer.fqn!r} stands in the model; {self._cure}"
                )
            depth = deep.get(layer.fqn, 0) / max(len(deep) - 1, 1)
            share = self.first + (self.last - self.first) * depth
            shares.append(share if self._counts(layer.fqn) else 0.0)
        return {"share": torch.tensor(shares, dtype=torch.float64)}

    @property
    def _cure(self) -> str:
        if self.order is not None:
            return (
                f"its option order names {len(self.order)} layers and not this one: name all of the model's"
            )
        return (
            "give the model: AdamSPD(..., model=model) or attach(optimizer, model); where that is a stage of "
            "a pipeline, or another part of a model, the names of all layers in order: the option order"
        )

    def _counts(self, fqn: str) -> bool:
        head = self.heads is not None and re.fullmatch(self.heads, fqn) is not None
        return not head and not fqn.endswith("bias")

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S of SPD, with the layer's own lambda; `[num_layers]`."""
        own = replace(options, weight_decay=options.weight_decay * state["share"])
        return SPD.pull(self, stats, state, own)
