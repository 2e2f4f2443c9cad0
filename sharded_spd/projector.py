"""The projector: what stands between an engine's optimizer step and the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sharded_spd import vouch, warn
from sharded_spd.agree import agree, check_same_layers, union
from sharded_spd.anchors.fingerprint import combine
from sharded_spd.binding import Binding, HeldAnchor, Resolver, bind
from sharded_spd.carry import export_layers, move_layers, restore_layers, stateful_layers
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import AnchorError, BindingError
from sharded_spd.layout import BoundShard
from sharded_spd.monitor import Monitor, measure_deviation
from sharded_spd.plan import Plan, Reduction, reduce_together_
from sharded_spd.roster import Roster
from sharded_spd.step import Step
from sharded_spd.unbound import check_unbound


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
        together: bool = False,
        telemetry_every: int = 0,
        telemetry_path: str | None = None,
    ) -> None:
        self._adapter = adapter
        self._resolve = resolve
        self._binding: Binding | None = None
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._rosters: dict[tuple[str, ...], Roster] = {}
        self._steps: dict[Optimizer, Step] = {}
        self._together = together
        self._waiting: list[tuple[Step, Reduction]] = []
        self._stateful = False
        self._moved = False
        self._loaded: dict[str, Any] = {}
        self._seed: dict[str, HeldAnchor] = {}
        self._handles: list[RemovableHandle] = []
        self._detached = False
        self._failure: Exception | None = None
        self._monitor = Monitor(telemetry_every, telemetry_path)
        if not deferred:
            self._bind(None, required=False)

    @property
    def bound(self) -> bool:
        """Whether the anchors are bound."""
        return self._binding is not None

    @property
    def num_steps(self) -> int:
        """Engine steps in which something moved."""
        return self._monitor.num_steps

    @property
    def attached(self) -> bool:
        """Whether hooks of an optimizer call this projector."""
        return bool(self._handles)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all anchors, the same for every layout. Raises BindingError before `bind()`."""
        return self._require().fingerprint

    @property
    def fingerprints(self) -> dict[str, tuple[int, ...]]:
        """The fingerprint of each layer's anchor, also of layers that only other ranks have."""
        binding = self._require()
        return {**binding.elsewhere, **binding.fingerprints}

    def anchor_names(self) -> dict[str, str | None]:
        """The tensor of its file that each layer is anchored at; None: at zero. Without other anchors."""
        return self._require().names

    def group_fingerprints(self, optimizer: Optimizer, ranks: ProcessGroup | None = None) -> list[str]:
        """The anchors' fingerprint of each param group, as "HASH/LAYERS", over all `ranks` together."""
        known = self._require().fingerprints
        number = {id(group): str(g) for g, group in enumerate(optimizer.param_groups)}
        layers = {
            f"{number[id(shard.param_group)]} {piece.layer}": known[piece.layer]
            for shard in self._adapter.bind(optimizer, grads=False)
            for piece in shard.slices
            if piece.layer in known
        }
        groups: list[dict[str, tuple[int, ...]]] = [{} for _ in number]
        for key, prints in union(layers, ranks).items():
            g, _, fqn = key.partition(" ")
            groups[int(g)][fqn] = prints
        return [f"{combine(own)}/{len(own)}" for own in groups]

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
            BindingError: where parameters still hold no values, or after `detach()`.
            ConfigError: for a pattern that matches nothing, or a path or pattern without names.
        """
        if self._detached:
            raise BindingError("this projector was detached and is not called any more; call attach() anew")
        self._steps.clear()
        self._waiting.clear()
        try:
            self._bind(model, required=True)
        except Exception as error:
            # The adapter may describe the new parameters and the binding the old ones: no step may use both.
            self._failure = error if self._binding is not None else None
            raise
        self._failure = None

    def _bind(self, model: Module | None, *, required: bool) -> None:
        layout = agree(lambda: self._adapter.layout(model), self._adapter.agreement_groups)
        if layout is None and not required:
            return
        if layout is None:
            raise BindingError(
                "some parameters hold no values yet (meta device, or not yet sharded); materialise the "
                "model, load the pre-trained weights, and then call bind()"
            )
        groups = self._adapter.agreement_groups
        check_same_layers(layout, groups)
        old, renamed = self._binding, layout.renamed
        shards = [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]
        owners = {piece.layer: shard.param_group for shard in shards for piece in shard.slices}
        theirs = union(dict.fromkeys(layout.fqns), layout.everywhere)
        layout = replace(layout, elsewhere=tuple(fqn for fqn in theirs if fqn not in layout.shapes))
        options = agree(partial(self._resolve, layout, owners, self._adapter.named), groups)
        held = {renamed.get(fqn, fqn): h for fqn, h in (old.held if old is not None else self._seed).items()}
        fresh = {renamed.get(fqn, fqn) for fqn in old.unverified.fresh} if old is not None else set()
        binding = bind(shards, layout, options, held, fresh, groups)
        agree(lambda: self._vouch(binding, renamed), groups)
        plans, self._binding, self._plans = list(self._plans.values()), binding, {}
        self._rosters.clear()
        for optimizer in self._adapter.optimizers:
            for call in self._adapter.inner_steps(optimizer):
                self._plan(call, plans, renamed)
        self._stateful = bool(union(stateful_layers(self._plans.values()), layout.everywhere))
        self._adapter.mark(binding.fingerprint)
        warn.about_anchors(binding)
        if old is None:
            self._restore(self._loaded)
            self._loaded, self._seed = {}, {}
            warn.about_binding(binding, shards)

    def _vouch(self, binding: Binding, renamed: Mapping[str, str]) -> None:
        vouch.check_stored(binding)
        if self._binding is None:
            vouch.check_strays(binding)
            vouch.check_pinned(binding)
            vouch.check_saved(self._loaded.get("fingerprint", ""), binding.fingerprint)
        else:
            vouch.check_unchanged(self._binding, binding, renamed)
            binding.found.away += [renamed.get(fqn, fqn) for fqn in self._binding.found.away]

    def _plan(
        self, shards: Sequence[BoundShard], old: Sequence[Plan] = (), renamed: Mapping[str, str] | None = None
    ) -> Plan:
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in self._plans:
            binding = self._require()
            device = shards[0].tensor.device if shards else torch.device("cpu")
            plan = Plan(fqns, binding, device)
            plan.prepare_shard_states(binding, shards)
            move_layers([*old, *self._plans.values()], [plan], binding.layout.shapes, renamed or {})
            self._plans[fqns] = plan
        return self._plans[fqns]

    def _roster(self, plan: Plan, shards: Sequence[BoundShard]) -> Roster:
        roster = self._rosters.get(plan.fqns)
        if roster is None or not roster.fits(shards):
            roster = self._rosters[plan.fqns] = Roster(plan, self._require(), shards)
        return roster

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, sums_later: bool = False) -> Step | None:
        """Take the statistics before `optimizer` steps; its gradients must be there.

        With `sums_later` the caller takes them, of the step that comes back (None: unbound).

        Raises:
            BindingError: unbound with gradients, or a parameter that was swapped or added since `bind()`.
        """
        self._steps.pop(optimizer, None)
        if self._failure is not None:
            raise self._failure
        if self._binding is None:
            check_unbound(optimizer, self._adapter.layout())
            return None
        shards = self._adapter.bind(optimizer, grads=True)
        plan = self._plan(shards)
        step = Step(plan, self._binding, self._roster(plan, shards), optimizer, shards, sums_later=sums_later)
        self._steps[optimizer] = step
        if step.moves and self._binding.found.away:
            warn.about_start(self._binding, shards)
        return step

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Finish what `before_step` began: reduce, find s, pull; log where it is due.

        Raises:
            AnchorError: at the first real step, where weights were loaded after the snapshot; and at all
            later ones.
            BindingError: where the optimizer stepped without `before_step`: it never called its closure.
        """
        step = self._steps.pop(optimizer, None)
        if step is None:
            if self._binding is not None:
                raise BindingError(
                    f"{type(optimizer).__name__} stepped without evaluating the closure that it was given; "
                    "the projection needs a gradient: call step() without a closure, after backward()"
                )
            return
        self._waiting.append((step, step.collect()))
        self._moved |= step.moves
        last = self._adapter.boundary(optimizer)
        if last or not self._together:
            self._project()
        if last and self._moved:
            self._moved = False
            self._monitor.step(list(self._plans.values()), self._require().norms)

    def _project(self) -> None:
        """Settle the inner steps that wait, by one reduction."""
        waiting, self._waiting = self._waiting, []
        steps = [step for step, _ in waiting]
        try:
            reduce_together_([reduction for _, reduction in waiting])
            for step in steps:
                step.project()
        except AnchorError as error:
            self._failure = error
            raise
        self._adapter.rewrite([shard for step in steps[:-1] for shard in step.shards])

    def add_hooks(self, handles: Sequence[RemovableHandle]) -> None:
        """Own the handles of the hooks that call this projector, for `detach`."""
        self._handles.extend(handles)

    def detach(self) -> None:
        """Take the hooks off the optimizers, which are plain again, and free the anchors; no way back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._adapter.mark(None)
        self._steps.clear()
        self._waiting.clear()
        self._plans.clear()
        self._rosters.clear()
        self._binding = None
        self._detached = True

    def metrics(self) -> dict[str, Any]:
        """Numbers of the last engine step: `activation_rate`, `deviation`, ..., and c, r, s of each layer.

        Waits for the device. Empty of layers before the first step.
        """
        norms = self._binding.norms if self._binding is not None else {}
        return self._monitor.metrics(list(self._plans.values()), norms)

    def deviation(self) -> dict[str, tuple[float, float]]:
        """|w - w0| and |w0| of every projected layer, now, also of those that only other ranks have.

        Collective.
        """
        shards = [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]
        binding = self._require()
        agree(binding.check_files, self._adapter.agreement_groups)
        return union(measure_deviation(binding, shards), binding.layout.everywhere)

    def state_dict(self) -> dict[str, Any]:
        """Rule state by FQN, the number of steps, the anchors' fingerprint; never the anchors.

        Collective where ranks have different layers and a rule has state.
        """
        fingerprint = self._binding.fingerprint if self._binding is not None else ""
        layers = export_layers(self._plans.values(), self._adapter)
        if self._binding is not None and self._stateful:
            layers = union(layers, self._binding.layout.everywhere)
        return {"fingerprint": fingerprint, "num_steps": self.num_steps, "layers": layers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore rule state; before `bind()` it is kept and restored there.

        The state of a run that has stepped vouches for weights that are not at their snapshot.

        Raises:
            AnchorError: where the checkpoint was written with other anchors.
        """
        if self._binding is None:
            self._loaded = dict(state_dict)
            return
        vouch.check_saved(state_dict.get("fingerprint", ""), self._binding.fingerprint)
        self._restore(state_dict)

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        self._monitor.num_steps = int(state_dict.get("num_steps", self.num_steps))
        if state_dict.get("num_steps", 0):
            self._require().unverified.fresh.clear()
            self._require().found.away.clear()
        restore_layers(self._plans.values(), self._adapter, state_dict.get("layers", {}))

    def export_anchors(self) -> dict[str, HeldAnchor]:
        """This rank's shards of the anchors, for a copy of the optimizer in another place."""
        return dict(self._binding.held) if self._binding is not None else {}

    def adopt(self, held: Mapping[str, HeldAnchor], state: Mapping[str, Any]) -> None:
        """Bind with anchors that `export_anchors` gave, instead of taking new ones."""
        self._seed = dict(held)
        self._loaded = dict(state)
        self._bind(None, required=False)
