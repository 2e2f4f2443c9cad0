"""The projector: connects an engine's optimizer step with the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.anchors.fingerprint import combine, combine_nameless
from sharded_spd.binding import checks
from sharded_spd.binding import warnings as warn
from sharded_spd.binding.bind import bind
from sharded_spd.binding.records import Binding, HeldAnchor, LayerSettings, Resolver
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import BindingError
from sharded_spd.kernels.choose import backend_names
from sharded_spd.projection.metrics import Monitor, is_first, measure_deviation
from sharded_spd.projection.rule_state import Moves, export_layers, find_layers, stateful_layers
from sharded_spd.projection.slices import StepPlan
from sharded_spd.projection.stepper import Calls, Plans, Stepper
from sharded_spd.sharding.collectives import agree, agree_and_tell, difference, union
from sharded_spd.sharding.layout import BoundShard, ShardLayout
from sharded_spd.sharding.reductions import sum_over_scopes_


class Removable(Protocol):
    """What `detach` removes, such as a hook's handle."""

    def remove(self) -> None:
        """Remove it."""
        ...


_STEPPED = "the projector's state is of a run that has stepped"
_BINDS = "called bind() (AdamSPD.add_param_group binds, too)"
SavedState = tuple[int, Moves]
"""A number of steps, and the moves that restore the rules' state."""


class Projector(Stepper):
    """Projects the layers of one or more optimizers toward their anchors around every step.

    A `torch.distributed.checkpoint` `Stateful`. Created by `attach` and `AdamSPD`, not by hand.
    """

    def __init__(
        self,
        adapter: EngineAdapter,
        resolve: Resolver,
        *,
        deferred: bool = False,
        per_step: bool = False,
        telemetry_every: int = 0,
        telemetry_path: str | None = None,
        foreign: bool = False,
    ) -> None:
        super().__init__(adapter, Monitor(telemetry_every, telemetry_path), per_step=per_step)
        self._resolve = resolve
        self._foreign = foreign
        self._stateful = False
        self._loaded: dict[str, Any] = {}
        self._seed: dict[str, HeldAnchor] = {}
        self._handles: list[Removable] = []
        self._detached = False
        if not deferred:
            self._bind(None, required=False)

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
        """The fingerprint of each layer's anchor, including layers that only other ranks have."""
        binding = self._require()
        return {**binding.elsewhere, **binding.fingerprints}

    def anchor_names(self) -> dict[str, str | None]:
        """By layer, its anchor's tensor in the file; None: zero. Layers with other anchors are left out."""
        return self._require().names

    def group_fingerprints(
        self, optimizer: Optimizer, ranks: ProcessGroup | None = None, binding: Binding | None = None
    ) -> list[str]:
        """The anchors' fingerprint of each param group over all `ranks`.

        "HASH/LAYERS/NAMED:HASH": the second hash is of the values without the layers' names, NAMED is "named"
        or "unnamed". `binding` may be one that is not in force yet.
        """
        fingerprints = (self._require() if binding is None else binding).fingerprints
        number = {id(group): str(g) for g, group in enumerate(optimizer.param_groups)}
        layers = {
            f"{number[id(shard.param_group)]} {piece.layer}": fingerprints[piece.layer]
            for shard in self._adapter.bind(optimizer, grads=False)
            for piece in shard.slices
            if piece.layer in fingerprints
        }
        groups: list[dict[str, tuple[int, ...]]] = [{} for _ in number]
        for key, prints in union(layers, ranks).items():
            index, _, fqn = key.partition(" ")
            groups[int(index)][fqn] = prints
        named = "named" if self._adapter.named else "unnamed"
        return [f"{combine(g)}/{len(g)}/{named}:{combine_nameless(g.values())}" for g in groups]

    @torch.no_grad()
    def bind(self, model: Module | None = None, *, vet: Callable[[Binding], None] | None = None) -> None:
        """Bind, or re-bind after sharding or adding groups; never re-snapshots what is bound already.

        Call it after the pre-trained weights are loaded and before resuming a checkpoint. Collective over
        the layout's scopes. If it fails, the old binding stays in force; `vet` may refuse the new one, alike
        on all ranks.

        Raises:
            AnchorError: an anchor does not fit or cannot be read; on all ranks.
            BindingError: parameters still hold no values, or the projector is detached.
            ConfigError: for a pattern that matches nothing, or a path or pattern without names.
        """
        if self._detached:
            raise BindingError("this projector is detached and no longer called; call attach() again")
        self._catch_up()
        self._meet(_BINDS)
        self._bind(model, required=True, vet=vet)
        self._failure = None

    def meet_to_bind(self, *, added: bool, refused: Exception | None) -> bool:
        """Whether any rank has `added` something to bind; all ranks learn it, and if a call was `refused`.

        Collective.

        Raises:
            The refusal, if another rank has added something.
        """
        self._catch_up()
        self._meet(_BINDS)
        flags = {name: "" for name, seen in (("added", added), ("refused", refused is not None)) if seen}
        groups = self._adapter.agreement_groups
        _, words = agree_and_tell(lambda: None, groups, lambda _: flags)

        def check() -> None:
            if refused is not None:
                raise refused

        if len(words) > 1:
            agree(check, groups)
        return "added" in words

    def _bind(
        self, model: Module | None, *, required: bool, vet: Callable[[Binding], None] | None = None
    ) -> None:
        undo = self._adapter.keep()
        try:
            self._bind_anew(model, required, vet)
        except Exception:
            undo()
            raise

    def _bind_anew(self, model: Module | None, required: bool, vet: Callable[[Binding], None] | None) -> None:
        """Build all of the new binding beside the one in force, and swap it in at the end."""
        self._adapter.take_model(model)
        layout, words = agree_and_tell(
            self._adapter.layout,
            self._adapter.agreement_groups,
            lambda layout: {"empty": ""} if layout is None else {},
        )
        if words and not required:
            return
        if layout is None or words:
            raise BindingError(
                "some parameters hold no values yet (meta device, or not yet sharded); materialise the "
                "model, load the pre-trained weights, and then call bind()"
            )
        groups = self._adapter.agreement_groups
        old, renamed = self._binding, layout.renamed
        layout, shards, options, facts = self._settle(layout, groups)
        held = old.held if old is not None else self._seed
        anchors = {renamed.get(fqn, fqn): anchor for fqn, anchor in held.items()}
        fresh = {renamed.get(fqn, fqn) for fqn in old.unverified.fresh} if old is not None else set()
        mismatch = difference(layout, facts)
        binding = bind(shards, layout, options, anchors, fresh, groups, mismatch)
        binding.unverified.foreign = self._foreign
        if old is not None:
            binding.unverified.stepped = {renamed.get(fqn, fqn) for fqn in old.unverified.stepped}
        pulled = [s for s in shards if any(options[p.layer].rule.spec.pulls for p in s.slices)]
        devices = {shard.tensor.device.type for shard in pulled}

        def finish() -> tuple[Plans, Calls, SavedState, dict[str, str]]:
            self._vouch(binding, renamed)
            plans, calls = self._make_plans(binding, renamed)
            return plans, calls, self._find_state(self._loaded, plans.values()), backend_names(devices)

        (plans, calls, saved, _), words = agree_and_tell(
            finish, groups, lambda result: {**result[3], **self._stepped(self._loaded)}
        )
        mixed = {device: names for device, names in words.items() if len(names) > 1}
        binding.plain = frozenset(mixed)
        warn.about_kernels(mixed)
        stateful = bool(union(stateful_layers(plans.values()), layout.everywhere))
        if vet is not None:
            vet(binding)
        self._binding, self._plans, self._calls, self._stateful = binding, plans, calls, stateful
        self._turns.clear()
        self._adapter.tag_param_groups(binding.fingerprint)
        warn.about_anchors(binding)
        if old is None:
            self._restore(saved, binding, stepped=_STEPPED in words)
            self._loaded, self._seed = {}, {}
            warn.about_binding(binding, shards)

    def _settle(
        self, layout: ShardLayout, groups: Sequence[ProcessGroup]
    ) -> tuple[ShardLayout, list[BoundShard], Mapping[str, LayerSettings], dict[str, dict[str, object]]]:
        """The layout with other ranks' layers, this rank's shards, each layer's settings, and their facts."""

        def local_shards() -> list[BoundShard]:
            self._monitor.open(is_first(groups))
            return self._shards()

        early = agree(local_shards, groups) if layout.everywhere is not None else None
        fqns = union(dict.fromkeys(layout.fqns), layout.everywhere)
        full_layout = replace(layout, elsewhere=tuple(fqn for fqn in fqns if fqn not in layout.shapes))

        def settle() -> tuple[list[BoundShard], Mapping[str, LayerSettings], dict[str, dict[str, object]]]:
            shards = local_shards() if early is None else early
            owners = {piece.layer: shard.param_group for shard in shards for piece in shard.slices}
            options = self._resolve(full_layout, owners, self._adapter.named)
            return shards, options, checks.facts(options, shards, self._per_step)

        return full_layout, *agree(settle, groups)

    def _vouch(self, binding: Binding, renamed: Mapping[str, str]) -> None:
        checks.check_stored(binding)
        if self._binding is None:
            checks.check_strays(binding)
            checks.check_pinned(binding)
            checks.check_saved(self._loaded.get("fingerprint", ""), binding.fingerprint)
        else:
            checks.check_unchanged(self._binding, binding, renamed)
            binding.found.differs_from_weights += [
                renamed.get(fqn, fqn) for fqn in self._binding.found.differs_from_weights
            ]

    def _shards(self) -> list[BoundShard]:
        return [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]

    def _make_plans(self, binding: Binding, renamed: Mapping[str, str]) -> tuple[Plans, Calls]:
        """All plans of a new binding, with the state of the current ones, and the plans of each optimizer."""
        plans: Plans = {}
        calls = {
            o: [self._plan(call, binding, plans, renamed) for call in self._adapter.inner_steps(o)]
            for o in self._adapter.optimizers
        }
        return plans, calls

    def add_hooks(self, handles: Sequence[Removable]) -> None:
        """Keep the handles of the hooks that call this projector, for `detach`."""
        self._handles.extend(handles)

    def detach(self) -> None:
        """Remove the hooks, so that the optimizers are plain again, and free the anchors; irreversible."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._adapter.tag_param_groups(None)
        self._clear()
        self._detached = True

    def metrics(self, *, gather: bool = False) -> dict[str, Any]:
        """Numbers of the last engine step: `activation_rate`, `deviation`, ..., and c, r, s of each layer.

        Covers the layers that this rank steps and that are not frozen: all of the model's, the same under
        every engine, unless ranks have different layers (an optimizer that partitions the parameters,
        experts). Then `gather` returns them all, and is collective. Waits for the device. Has no layers
        before the first step.
        """
        norms = self._binding.norms if self._binding is not None else {}
        ranks = self._binding.layout.everywhere if gather and self._binding is not None else None
        return self._monitor.metrics(list(self._plans.values()), norms, ranks)

    def deviation(self) -> dict[str, tuple[float, float]]:
        """The current |w - w0| and |w0| of every projected layer, including those that only other ranks have.

        Collective.
        """
        self._catch_up()
        binding, groups = self._require(), self._adapter.agreement_groups
        fqns, sums = agree(lambda: measure_deviation(binding, self._shards()), groups)
        sum_over_scopes_(sums, fqns, binding.layout.scopes)
        values = {fqn: (x, binding.norms[fqn]) for fqn, x in zip(fqns, sums.sqrt().tolist(), strict=True)}
        return union(values, binding.layout.everywhere)

    def state_dict(self) -> dict[str, Any]:
        """Rule state by FQN, the number of steps, the anchors' fingerprint; never the anchors.

        Collective where ranks have different layers and a rule has state.
        """
        self._catch_up()
        fingerprint = self._binding.fingerprint if self._binding is not None else ""
        layers = export_layers(self._plans.values(), self._adapter)
        if self._binding is not None and self._stateful:
            layers = union(layers, self._binding.layout.everywhere)
        return {"fingerprint": fingerprint, "num_steps": self.num_steps, "layers": layers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore rule state; before `bind()`, keep it and restore it there.

        The state of a run that has stepped permits weights that are not at their snapshot.

        Raises:
            AnchorError: the checkpoint was written with other anchors.
        """
        self._catch_up()
        if self._binding is None:
            self._loaded = dict(state_dict)
            return
        self.prepare_load(state_dict)()

    def prepare_load(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Check state before it is loaded; the returned function loads it. Collective.

        Raises:
            AnchorError: it was written with other anchors.
            BindingError: a shard has another size.
        """
        binding, saved = self._require(), state_dict.get("fingerprint", "")

        def check() -> SavedState:
            checks.check_saved(saved, binding.fingerprint)
            return self._find_state(state_dict, self._plans.values())

        saved_state, words = agree_and_tell(
            check, self._adapter.agreement_groups, lambda _: self._stepped(state_dict)
        )
        return partial(self._restore, saved_state, binding, stepped=_STEPPED in words)

    @staticmethod
    def _stepped(state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Sent to the other ranks, since step counts may differ: it decides what the guard sends."""
        return {_STEPPED: ""} if state_dict.get("num_steps", 0) else {}

    def _find_state(self, state_dict: Mapping[str, Any], plans: Iterable[StepPlan]) -> SavedState:
        num_steps = int(state_dict.get("num_steps", self.num_steps))
        return num_steps, find_layers(plans, self._adapter, state_dict.get("layers", {}))

    @torch.no_grad()
    def _restore(self, saved: SavedState, binding: Binding, *, stepped: bool) -> None:
        self._monitor.num_steps, moves = saved
        if stepped:
            binding.unverified.fresh.clear()
            binding.found.differs_from_weights.clear()
        for target, value in moves:
            target.copy_(value)

    def export_anchors(self) -> dict[str, HeldAnchor]:
        """This rank's shards of the anchors, for a copy of the optimizer elsewhere."""
        return dict(self._binding.held) if self._binding is not None else {}

    def adopt(self, held: Mapping[str, HeldAnchor], state: Mapping[str, Any]) -> None:
        """Bind with anchors from `export_anchors`, instead of taking new ones."""
        self._seed = dict(held)
        self._loaded = dict(state)
        self._bind(None, required=False)
