"""The projector: what stands between an engine's optimizer step and the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sharded_spd import warn
from sharded_spd.agree import agree
from sharded_spd.anchors.fingerprint import combine
from sharded_spd.binding import Binding, HeldAnchor, Resolver, bind, flat
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import AnchorError, BindingError
from sharded_spd.hostvec import LateScalar
from sharded_spd.layout import BoundShard
from sharded_spd.plan import Plan
from sharded_spd.stats import CHUNK, all_reduce_, fixed_sum
from sharded_spd.step import Step
from sharded_spd.telemetry import JsonLines, summarize


class Projector:
    """Projects the layers of one or more optimizers toward their anchors around every step.

    A `torch.distributed.checkpoint` `Stateful`. Made by `attach` and `AdamSPD`, not by hand.
    """

    def __init__(
        self,
        adapter: EngineAdapter,
        resolve: Resolver,
        *,
        deferred: bool = False,
        telemetry_every: int = 0,
        telemetry_path: str | None = None,
    ) -> None:
        self._adapter = adapter
        self._resolve = resolve
        self._binding: Binding | None = None
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._steps: dict[Optimizer, Step] = {}
        self._loaded: dict[str, Any] = {}
        self._seed: dict[str, HeldAnchor] = {}
        self._handles: list[RemovableHandle] = []
        self._every = telemetry_every
        self._log = JsonLines(telemetry_path) if telemetry_path and _is_rank_zero() else None
        self._excess = LateScalar()
        self._warned_excess = False
        self.num_steps = 0
        if not deferred and adapter.layout() is not None:
            self.bind()

    @property
    def bound(self) -> bool:
        """Whether the anchors are bound."""
        return self._binding is not None

    @property
    def attached(self) -> bool:
        """Whether hooks of an optimizer call this projector."""
        return bool(self._handles)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all anchors, the same for every layout. Raises BindingError before `bind()`."""
        return self._require().fingerprint

    def group_fingerprints(self, optimizer: Optimizer) -> list[str]:
        """The fingerprint of the anchors of each of the optimizer's param groups."""
        known = self._require().fingerprints
        layers: dict[int, dict[str, tuple[int, ...]]] = {id(g): {} for g in optimizer.param_groups}
        for shard in self._adapter.bind(optimizer, grads=False):
            own = layers[id(shard.param_group)]
            own.update({p.layer: known[p.layer] for p in shard.slices if p.layer in known})
        return [combine(own) for own in layers.values()]

    def _require(self) -> Binding:
        if self._binding is None:
            raise BindingError(
                "the anchors are not bound yet; call bind() after sharding and loading the weights"
            )
        return self._binding

    @torch.no_grad()
    def bind(self, model: Module | None = None) -> None:
        """Bind, or bind anew after sharding or adding groups; what is bound already is never snapshot again.

        Call it once the pre-trained weights are loaded and before a checkpoint is resumed. Collective over
        the layout's scopes.

        Raises:
            AnchorError: where an anchor does not fit or cannot be read; on all ranks.
            BindingError: where parameters still hold no values.
            ConfigError: for a pattern that matches nothing, or a path or pattern without names.
        """
        layout = self._adapter.layout(model)
        if layout is None:
            raise BindingError(
                "some parameters hold no values yet (meta device, or not yet sharded); materialise the "
                "model, load the pre-trained weights, and then call bind()"
            )
        shards = [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]
        groups = self._adapter.agreement_groups
        owners = {piece.layer: shard.param_group for shard in shards for piece in shard.slices}
        options = agree(lambda: self._resolve(layout, owners, self._adapter.named), groups)
        saved = self.state_dict() if self._binding is not None else self._loaded
        first = self._binding is None
        held = self._binding.held if self._binding is not None else self._seed
        self._binding = bind(shards, layout, options, held, groups)
        self._seed = {}
        self._plans.clear()
        self._steps.clear()
        for optimizer in self._adapter.optimizers:
            self._plan(self._adapter.bind(optimizer, grads=False))
        self._restore(saved)
        if first:
            warn.about_binding(self._binding, shards)

    def _plan(self, shards: Sequence[BoundShard]) -> Plan:
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in self._plans:
            device = shards[0].tensor.device if shards else torch.device("cpu")
            self._plans[fqns] = Plan(fqns, self._require(), device)
        return self._plans[fqns]

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Take the statistics before `optimizer` steps; its gradients must be there.

        Raises:
            BindingError: unbound with gradients, or a parameter that was swapped or added since `bind()`.
        """
        self._steps.pop(optimizer, None)
        if self._binding is None:
            self._check_unbound(optimizer)
            return
        shards = self._adapter.bind(optimizer, grads=True)
        self._steps[optimizer] = Step(self._plan(shards), self._binding, optimizer, shards)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Finish what `before_step` began: reduce, find s, pull; log where it is due.

        Raises:
            AnchorError: at the first real step, where weights were loaded after the snapshot.
        """
        step = self._steps.pop(optimizer, None)
        if step is None:
            return
        step.finish()
        if self._adapter.boundary(optimizer):
            self.num_steps += 1
            self._watch()
            if self._every and self.num_steps % self._every == 0:
                record = self.metrics()
                if self._log is not None:
                    self._log.write(record)

    def _watch(self) -> None:
        """Warn once of a pull beyond 1, some steps late rather than wait for the device."""
        if self._warned_excess:
            return
        reports = [report["s"].max() for plan in self._plans.values() for report in plan.reports.values()]
        if reports:
            self._excess.post(torch.stack(reports).max())
        excess = self._excess.take()
        if excess is not None and excess > 1:
            self._warned_excess = True
            warn.about_excess(excess)

    def _check_unbound(self, optimizer: Optimizer) -> None:
        """An unbound step passes as the plain base where it moves nothing for lack of gradients."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        layout = self._adapter.layout()
        live = torch.zeros(1)
        for param in params:
            if param.grad is not None and bool(flat(getattr(param.grad, "_local_tensor", param.grad)).any()):
                live.fill_(1)
        for scope in layout.scopes if layout is not None else ():
            all_reduce_(live, scope.group)
        if bool(live):
            raise BindingError(
                f"{type(optimizer).__name__} was asked to step with gradients before its anchors are bound: "
                "this would be the plain base optimizer; call bind() after sharding and loading the "
                "pre-trained weights"
            )

    def detach(self) -> None:
        """Take the hooks off the optimizers: they are plain again. The anchors are freed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.clear()
        self._plans.clear()
        self._binding = None

    def metrics(self) -> dict[str, Any]:
        """Numbers of the last engine step: `activation_rate`, `deviation`, ..., and c, r, s of each layer.

        Waits for the device. Empty of layers before the first step.
        """
        reports = [
            (part.fqns, plan.reports[p])
            for plan in self._plans.values()
            for p, part in enumerate(plan.parts)
            if p in plan.reports and part.rule.spec.anchored
        ]
        return {"step": self.num_steps, **summarize(reports, self._require().norms if self.bound else {})}

    @torch.no_grad()
    def deviation(self) -> dict[str, tuple[float, float]]:
        """|w - w0| and |w0| of every projected layer, now. Collective over the layout's scopes."""
        binding = self._require()
        shards = [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]
        pieces = {p.layer: (shard, p) for shard in shards for p in shard.slices if p.layer in binding.held}
        fqns = [fqn for fqn in binding.layout.fqns if fqn in pieces]
        sums = torch.zeros(len(fqns), dtype=torch.float64)
        for i, fqn in enumerate(fqns):
            shard, piece = pieces[fqn]
            held = binding.held[fqn]
            if held.pending:
                continue
            weight = flat(shard.tensor)[piece.offset : piece.offset + piece.numel]
            for begin in range(0, weight.numel(), CHUNK):
                delta = weight[begin : begin + CHUNK].double()
                if held.values is not None:
                    delta = delta - held.values[begin : begin + CHUNK].to(delta.device).double()
                sums[i] += fixed_sum(delta * delta).to(sums.device)
        column = {fqn: i for i, fqn in enumerate(fqns)}
        for scope in binding.layout.scopes:
            columns = [column[fqn] for fqn in scope.layers if fqn in column]
            part = sums[columns]
            all_reduce_(part, scope.group)
            sums[columns] = part
        return {fqn: (x, binding.norms[fqn]) for fqn, x in zip(fqns, sums.sqrt().tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Rule state by FQN, the number of steps, the anchors' fingerprint; never the anchors."""
        layers: dict[str, dict[str, Any]] = {}
        for plan in self._plans.values():
            for part in plan.parts:
                for i, fqn in enumerate(part.fqns):
                    own = {f"layer.{name}": values[i].clone() for name, values in part.state.items()}
                    for name, values in plan.shard_states.get(fqn, {}).items():
                        own[f"shard.{name}"] = self._adapter.export(fqn, values)
                    if own:
                        layers[fqn] = own
        fingerprint = self._binding.fingerprint if self._binding is not None else ""
        return {"fingerprint": fingerprint, "num_steps": self.num_steps, "layers": layers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore rule state; before `bind()` it is kept and restored there.

        Raises:
            AnchorError: where the checkpoint was written with other anchors.
        """
        saved, own = (
            state_dict.get("fingerprint", ""),
            self._binding.fingerprint if self._binding is not None else "",
        )
        if saved and own and saved != own:
            raise AnchorError(
                f"the checkpoint was written with anchor fingerprint {saved}, this run has {own}: another "
                "pre-trained model, or weights loaded before the anchor was taken; bind the checkpoint's "
                "anchor, then load"
            )
        if self._binding is None:
            self._loaded = dict(state_dict)
        self._restore(state_dict)

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        self.num_steps = int(state_dict.get("num_steps", self.num_steps))
        layers = state_dict.get("layers", {})
        for plan in self._plans.values():
            for part in plan.parts:
                for i, fqn in enumerate(part.fqns):
                    for key, value in layers.get(fqn, {}).items():
                        kind, name = key.split(".", 1)
                        if kind == "layer" and name in part.state:
                            part.state[name][i] = value
                        elif kind == "shard":
                            local = self._adapter.restore(fqn, value)
                            plan.shard_states.setdefault(fqn, {})[name] = local.to(plan.device, copy=True)

    def export_anchors(self) -> dict[str, HeldAnchor]:
        """This rank's shards of the anchors, for a copy of the optimizer in another place."""
        return dict(self._binding.held) if self._binding is not None else {}

    def adopt(self, held: Mapping[str, HeldAnchor], state: Mapping[str, Any]) -> None:
        """Bind with anchors that `export_anchors` gave, instead of taking new ones."""
        self._seed = dict(held)
        self._loaded = dict(state)
        if held and self._adapter.layout() is not None:
            self.bind()

    def add_hooks(self, handles: Sequence[RemovableHandle]) -> None:
        """Own the handles of the hooks that call this projector, for `detach`."""
        self._handles.extend(handles)


def _is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
