"""The projector: what stands between an engine's optimizer step and the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd import vouch, warn
from sharded_spd.agree import agree, agree_and_tell, difference, union
from sharded_spd.anchors.fingerprint import combine, combine_nameless
from sharded_spd.binding import Binding, HeldAnchor, LayerSettings, Resolver, bind
from sharded_spd.carry import Moves, export_layers, find_layers, move_layers, stateful_layers
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import AnchorError, BindingError
from sharded_spd.hostvec import is_capturing
from sharded_spd.kernels import backend_names
from sharded_spd.layout import BoundShard, ShardLayout
from sharded_spd.monitor import Monitor, is_first, measure_deviation
from sharded_spd.plan import Heard, Plan, reduce_together_
from sharded_spd.roster import Roster
from sharded_spd.stats import sum_over_scopes_
from sharded_spd.step import Step
from sharded_spd.unbound import check_unbound
from sharded_spd.verdict import Evidence, Verdict


class Removable(Protocol):
    """What `detach` takes off again: a hook's handle, for one."""

    def remove(self) -> None:
        """Take it off."""
        ...


_STEPPED = "the projector's state is of a run that has stepped"
Plans = dict[tuple[str, ...], Plan]
Calls = dict[Optimizer, list[Plan]]
Found = tuple[int, Moves]
"""A number of steps, and where each part of the rules' state is to go."""


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
        foreign: bool = False,
    ) -> None:
        self._adapter = adapter
        self._resolve = resolve
        self._binding: Binding | None = None
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._rosters: dict[tuple[str, ...], Roster] = {}
        self._steps: dict[Optimizer, Step] = {}
        self._together = together
        self._foreign = foreign
        self._waiting: list[Step] = []
        self._verdicts: list[Verdict] = []
        self._calls: dict[Optimizer, list[Plan]] = {}
        self._turns: dict[Optimizer, int] = {}
        self._stateful = False
        self._loaded: dict[str, Any] = {}
        self._seed: dict[str, HeldAnchor] = {}
        self._handles: list[Removable] = []
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
    def meets(self) -> bool:
        """Whether ranks sum over each other in a step."""
        return self._binding is not None and bool(self._binding.layout.scopes)

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

    def group_fingerprints(
        self, optimizer: Optimizer, ranks: ProcessGroup | None = None, binding: Binding | None = None
    ) -> list[str]:
        """The anchors' fingerprint of each param group over all `ranks` together.

        "HASH/LAYERS/NAMED:HASH", the second hash that of the values without the layers' names, NAMED "named"
        or "unnamed"; of a `binding` that is not in force yet, where one is given.
        """
        known = (self._require() if binding is None else binding).fingerprints
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
        named = "named" if self._adapter.named else "unnamed"
        return [f"{combine(own)}/{len(own)}/{named}:{combine_nameless(own.values())}" for own in groups]

    def _require(self) -> Binding:
        if self._binding is None:
            raise BindingError(
                "the anchors are not bound yet; call bind() after sharding and loading the weights"
            )
        return self._binding

    @torch.no_grad()
    def bind(self, model: Module | None = None, *, vet: Callable[[Binding], None] | None = None) -> None:
        """Bind, or bind anew after sharding or adding groups; what is bound already is never snapshot again.

        Call it once the pre-trained weights are loaded and before a checkpoint is resumed. Collective over
        the layout's scopes. What is bound stays in force where it fails; `vet` may refuse the new binding, on
        all ranks alike.

        Raises:
            AnchorError: where an anchor does not fit or cannot be read; on all ranks.
            BindingError: where parameters still hold no values, or after `detach()`.
            ConfigError: for a pattern that matches nothing, or a path or pattern without names.
        """
        if self._detached:
            raise BindingError("this projector was detached and is not called any more; call attach() anew")
        self._catch_up()
        self._meet("called bind() (AdamSPD.add_param_group binds, too)")
        self._bind(model, required=True, vet=vet)
        self._failure = None

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
        """Make everything of the new binding beside what is in force, and put it in place at the end."""
        self._adapter.take_model(model)
        layout, words = agree_and_tell(
            self._adapter.layout,
            self._adapter.agreement_groups,
            lambda found: {"empty": ""} if found is None else {},
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
        held = {renamed.get(fqn, fqn): h for fqn, h in (old.held if old is not None else self._seed).items()}
        fresh = {renamed.get(fqn, fqn) for fqn in old.unverified.fresh} if old is not None else set()
        wrong = difference(layout, facts)
        binding = bind(shards, layout, options, held, fresh, groups, wrong)
        binding.unverified.foreign = self._foreign
        if old is not None:
            binding.unverified.stepped = {renamed.get(fqn, fqn) for fqn in old.unverified.stepped}
        pulled = [s for s in shards if any(options[p.layer].rule.spec.pulls for p in s.slices)]
        devices = {shard.tensor.device.type for shard in pulled}

        def finish() -> tuple[
            dict[tuple[str, ...], Plan], dict[Optimizer, list[Plan]], Found, dict[str, str]
        ]:
            self._vouch(binding, renamed)
            plans, calls = self._make_plans(binding, renamed)
            return plans, calls, self._find_state(self._loaded, plans.values()), backend_names(devices)

        (plans, calls, found, _), words = agree_and_tell(
            finish, groups, lambda own: {**own[3], **self._stepped(self._loaded)}
        )
        unlike = {device: names for device, names in words.items() if len(names) > 1}
        binding.plain = frozenset(unlike)
        warn.about_kernels(unlike)
        stateful = bool(union(stateful_layers(plans.values()), layout.everywhere))
        if vet is not None:
            vet(binding)
        self._binding, self._plans, self._calls, self._stateful = binding, plans, calls, stateful
        self._rosters.clear()
        self._turns.clear()
        self._adapter.mark(binding.fingerprint)
        warn.about_anchors(binding)
        if old is None:
            self._restore(found, binding, stepped=_STEPPED in words)
            self._loaded, self._seed = {}, {}
            warn.about_binding(binding, shards)

    def _settle(
        self, layout: ShardLayout, groups: Sequence[ProcessGroup]
    ) -> tuple[ShardLayout, list[BoundShard], Mapping[str, LayerSettings], dict[str, dict[str, object]]]:
        """The layout with other ranks' layers, this rank's shards, each layer's settings, and their facts."""

        def look() -> list[BoundShard]:
            self._monitor.open(is_first(groups))
            return self._shards()

        early = agree(look, groups) if layout.everywhere is not None else None
        theirs = union(dict.fromkeys(layout.fqns), layout.everywhere)
        whole = replace(layout, elsewhere=tuple(fqn for fqn in theirs if fqn not in layout.shapes))

        def settle() -> tuple[list[BoundShard], Mapping[str, LayerSettings], dict[str, dict[str, object]]]:
            shards = look() if early is None else early
            owners = {piece.layer: shard.param_group for shard in shards for piece in shard.slices}
            options = self._resolve(whole, owners, self._adapter.named)
            return shards, options, vouch.facts(options, shards, self._together)

        return whole, *agree(settle, groups)

    def _vouch(self, binding: Binding, renamed: Mapping[str, str]) -> None:
        vouch.check_stored(binding)
        if self._binding is None:
            vouch.check_strays(binding)
            vouch.check_pinned(binding)
            vouch.check_saved(self._loaded.get("fingerprint", ""), binding.fingerprint)
        else:
            vouch.check_unchanged(self._binding, binding, renamed)
            binding.found.away += [renamed.get(fqn, fqn) for fqn in self._binding.found.away]

    def _shards(self) -> list[BoundShard]:
        return [s for o in self._adapter.optimizers for s in self._adapter.bind(o, grads=False)]

    def _make_plans(self, binding: Binding, renamed: Mapping[str, str]) -> tuple[Plans, Calls]:
        """All plans of a new binding, with the state of those in force, and those of each optimizer."""
        plans: dict[tuple[str, ...], Plan] = {}
        calls = {
            o: [self._plan(call, binding, plans, renamed) for call in self._adapter.inner_steps(o)]
            for o in self._adapter.optimizers
        }
        return plans, calls

    def _plan(
        self,
        shards: Sequence[BoundShard],
        binding: Binding,
        plans: dict[tuple[str, ...], Plan],
        renamed: Mapping[str, str],
    ) -> Plan:
        """The one of `plans` for these shards; one that is made now (and added) takes over their state."""
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in plans:
            device = shards[0].tensor.device if shards else torch.device("cpu")
            plan = Plan(fqns, binding, device)
            plan.prepare_shard_states(binding, shards)
            move_layers([*self._plans.values(), *plans.values()], [plan], binding.layout.shapes, renamed)
            plans[fqns] = plan
        return plans[fqns]

    def _roster(self, plan: Plan, shards: Sequence[BoundShard]) -> Roster:
        roster = self._rosters.get(plan.fqns)
        if roster is None or not roster.fits(shards):
            roster = self._rosters[plan.fqns] = Roster(plan, self._require(), shards)
        return roster

    @torch.no_grad()
    def before_step(
        self, optimizer: Optimizer, *, sums_later: bool = False, base_decays: Set[int] = frozenset()
    ) -> Step | None:
        """Take the statistics before `optimizer` steps; its gradients must be there.

        What fails on this rank is raised here where no rank waits for it, else once all ranks know: at the
        first reduction of the step. With `sums_later` the caller takes the sums, of the step that comes back
        (None: unbound). `base_decays` are the ids of param groups whose decay the base step does itself.

        Raises:
            BindingError: unbound with gradients, or a parameter that was swapped or added since `bind()`.
        """
        if self._binding is None:
            if self._failure is not None:
                raise self._failure
            check_unbound(optimizer, self._adapter.agreement_groups)
            return None
        self._catch_up(optimizer)
        step, shards = self._begin(optimizer)
        step.base_decays = base_decays
        self._turns[optimizer] = self._turns.get(optimizer, 0) + 1
        if step.failure is None:
            with step.trying():
                step.prepare(self._roster(step.plan, shards), shards)
        if step.failure is not None and not step.meets:
            raise step.failure
        try:
            self._start(step)
        except Exception:
            step.release()
            raise
        if not sums_later:
            with step.trying():
                step.add_before()
        self._steps[optimizer] = step
        if step.moves and self._binding.found.away:
            warn.about_start(self._binding, shards)
        return step

    def _begin(self, optimizer: Optimizer) -> tuple[Step, Sequence[BoundShard]]:
        """A step of what `optimizer` holds now; where that cannot be told, of what it is expected to step."""
        binding, failure, shards = self._require(), self._failure, []
        calls = self._calls.get(optimizer, [])
        plan = calls[self._turns.get(optimizer, 0) % len(calls)] if calls else None
        try:
            if failure is None:
                shards = list(self._adapter.bind(optimizer, grads=True))
                plan = self._plan_of(shards)
        except Exception as error:  # told to the other ranks in the step's reduction
            failure = error
        if plan is None:
            raise failure or BindingError(f"this {type(optimizer).__name__} was not bound; call bind()")
        if any(plan is step.plan for step in self._waiting):
            self._project()
        step = Step(plan, binding, optimizer)
        if failure is not None:
            step.fail(failure)
        return step, shards

    def _plan_of(self, shards: Sequence[BoundShard]) -> Plan:
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in self._plans and self._require().layout.scopes:
            raise BindingError(
                f"the optimizer steps {len(fqns)} layers that it did not step together when the anchors were "
                "bound: a param group was added, taken away or changed; call bind() on every rank"
            )
        return self._plan(shards, self._require(), self._plans, {})

    def _start(self, step: Step) -> None:
        """Reduce what is needed ahead of the base step, if anything is."""
        if not step.starts:
            return
        heard = reduce_together_([step.early_reduction()])
        step.starts = False
        self._hear(heard, [], [step])
        with step.trying():
            step.edit()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Finish what `before_step` began: reduce, find s, pull; log where it is due.

        Raises:
            AnchorError: at the first real step, where weights were loaded after the snapshot; and at all
            later ones.
            BindingError: where the optimizer stepped without `before_step`: it never called its closure.
            ConfigError: where learning rate, lambda or bound differ between ranks that share a layer.
            What failed on any rank that shares a layer; on the others with that rank's number.
        """
        if self._binding is None:
            return
        step = self._steps.pop(optimizer, None)
        if step is None:
            self.break_off(
                optimizer,
                BindingError(
                    f"{type(optimizer).__name__} stepped without evaluating the closure that it was given; "
                    "the projection needs a gradient: call step() without a closure, after backward()"
                ),
            )
        with step.trying():
            step.add_after()
        self._waiting.append(step)
        last = self._adapter.boundary(optimizer)
        # Without a scope there is nothing to be reduced, and so nothing to wait for.
        if last or not self._together or not self._binding.layout.scopes:
            self._project()
        if last:
            self._turns.clear()
            self._monitor.step(list(self._plans.values()), self._require().norms)

    def break_off(self, optimizer: Optimizer, error: Exception) -> NoReturn:
        """Raise `error`, which keeps this rank from finishing its step, on every rank that waits for it.

        Raises:
            The first error of this step on this rank.
        """
        if self._binding is None:
            raise error
        step = self._steps.pop(optimizer, None)
        if step is None:
            step, _ = self._begin(optimizer)
        step.fail(error)
        if step.meets:
            self._start(step)
            self._finish_with(step)
        raise step.failure or error

    def _finish_with(self, *broken: Step, now: bool = False) -> None:
        """Reduce what waits with `broken`, and what the other ranks have stepped by the time they reduce."""
        self._waiting += broken
        if self._together:
            done = {id(step.plan) for step in self._waiting}
            rest = [
                (optimizer, plan)
                for optimizer, calls in self._calls.items()
                for plan in calls
                if id(plan) not in done
            ]
            for optimizer, plan in rest:
                step = Step(plan, self._require(), optimizer)
                step.fail(BindingError("this rank ended its step early"), absent=True)
                self._waiting.append(step)
        self._project(now=now)

    def _project(self, *, now: bool = False) -> None:
        """Settle the inner steps that wait, by one reduction."""
        steps, self._waiting = self._waiting, []
        try:
            heard = reduce_together_([step.reduction() for step in steps])
            evidence = [found for step in steps if (found := step.evidence()) is not None]
            self._hear(heard, evidence, steps, now=now)
            self._pull(steps, told=bool(heard))
            for step in steps:
                self._monitor.note(step.moves, step.skipped)
        except Exception:
            self._turns.clear()
            raise
        finally:
            for step in steps:
                step.release()
        self._adapter.rewrite([shard for step in steps[:-1] for shard in step.shards])

    def _pull(self, steps: Sequence[Step], *, told: bool) -> None:
        """Find s and pull. What fails here on one rank is `told` to the others, if at all, a step later."""
        try:
            for step in steps:
                if step.failure is None:
                    step.project()
        except Exception as error:
            if told:
                self._failure = error
            raise

    def _hear(
        self,
        heard: Sequence[Heard],
        evidence: Sequence[Evidence],
        steps: Sequence[Step],
        *,
        now: bool = False,
    ) -> None:
        """Raise what any rank has said; on a GPU when the next step begins, unless it has to be `now`."""
        failures = sorted((step for step in steps if step.failure is not None), key=lambda step: step.absent)
        if not heard and not evidence and not failures:
            return
        failure = failures[0].failure if failures else None
        told = [h.words for h in heard] + [e.rows for e in evidence]
        if told and not is_capturing():
            verdict = Verdict(heard, evidence, self._require().unverified)
            if now or not verdict.late:
                self._read(verdict, failure, {k: v for step in steps for k, v in step.settings.items()})
                return
            self._verdicts.append(verdict)
        if failure is not None:
            if not heard and self.meets:  # told in the next reduction
                self._failure = failure
            raise failure

    def _read(self, verdict: Verdict, failure: Exception | None = None, settings: Any = None) -> None:
        try:
            verdict.read(failure, settings)
        except AnchorError as error:
            self._failure = error
            raise

    def _catch_up(self, optimizer: Optimizer | None = None) -> None:
        """Finish what is under way, before something that reads or changes it; collective if anything is.

        `optimizer` is about to step: what waits of others then goes on waiting.
        """
        if self._binding is None:
            return
        if not is_capturing():
            verdicts, self._verdicts = self._verdicts, []
            for verdict in verdicts:
                self._read(verdict)
        broken = [step for o, step in self._steps.items() if optimizer in (None, o)]
        if broken:
            for step in broken:
                del self._steps[step.optimizer]
                if step.failure is None:
                    text = "began a step that an exception ended, and that another rank has finished"
                    step.fail(BindingError(f"{type(step.optimizer).__name__} {text}"), absent=True)
            broken = [step for step in broken if step.meets]
        if broken:
            self._finish_with(*broken, now=True)
        # Of an optimizer that is called several times in an engine step, another part is to step.
        again = len(self._calls.get(optimizer, ())) == 1 if optimizer is not None else True
        if again and any(optimizer in (None, step.optimizer) for step in self._waiting):
            self._project()

    def _meet(self, what: str) -> None:
        """Make sure that the ranks that share layers all do `what`, and none takes a step instead."""
        binding = self._binding
        if binding is None:
            return
        steps = [Step(plan, binding, o) for o, calls in self._calls.items() for plan in calls]
        step = next((step for step in steps if step.meets), None)
        if step is None:
            return
        step.fail(BindingError(f"{what}, and another rank took a step; do it on every rank"), absent=True)
        if step.starts:
            self._hear(reduce_together_([step.early_reduction()]), [], [step], now=True)
        elif self._together:
            self._finish_with(step, now=True)
        else:
            self._hear(reduce_together_([step.reduction()]), [], [step], now=True)

    def add_hooks(self, handles: Sequence[Removable]) -> None:
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
        self._verdicts.clear()
        self._calls.clear()
        self._plans.clear()
        self._rosters.clear()
        self._binding = None
        self._detached = True

    def metrics(self, *, gather: bool = False) -> dict[str, Any]:
        """Numbers of the last engine step: `activation_rate`, `deviation`, ..., and c, r, s of each layer.

        Of the layers that this rank steps and that are not frozen: all of the model's, the same under every
        engine, but where ranks have layers of their own (an optimizer that shares the parameters out,
        experts). There `gather` gives them all, and is collective. Waits for the device. Empty of layers
        before the first step.
        """
        norms = self._binding.norms if self._binding is not None else {}
        ranks = self._binding.layout.everywhere if gather and self._binding is not None else None
        return self._monitor.metrics(list(self._plans.values()), norms, ranks)

    def deviation(self) -> dict[str, tuple[float, float]]:
        """|w - w0| and |w0| of every projected layer, now, also of those that only other ranks have.

        Collective.
        """
        self._catch_up()
        binding, groups = self._require(), self._adapter.agreement_groups
        fqns, sums = agree(lambda: measure_deviation(binding, self._shards()), groups)
        sum_over_scopes_(sums, fqns, binding.layout.scopes)
        own = {fqn: (x, binding.norms[fqn]) for fqn, x in zip(fqns, sums.sqrt().tolist(), strict=True)}
        return union(own, binding.layout.everywhere)

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
        """Restore rule state; before `bind()` it is kept and restored there.

        The state of a run that has stepped vouches for weights that are not at their snapshot.

        Raises:
            AnchorError: where the checkpoint was written with other anchors.
        """
        self._catch_up()
        if self._binding is None:
            self._loaded = dict(state_dict)
            return
        self.prepare_load(state_dict)()

    def prepare_load(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Check state that is to be loaded; what comes back loads it. Collective.

        Raises:
            AnchorError: where it was written with other anchors.
            BindingError: for a shard of another size.
        """
        binding, saved = self._require(), state_dict.get("fingerprint", "")

        def check() -> Found:
            vouch.check_saved(saved, binding.fingerprint)
            return self._find_state(state_dict, self._plans.values())

        found, words = agree_and_tell(
            check, self._adapter.agreement_groups, lambda _: self._stepped(state_dict)
        )
        return partial(self._restore, found, binding, stepped=_STEPPED in words)

    @staticmethod
    def _stepped(state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Told to the other ranks, for the count of one may be another: it decides what the guard sends."""
        return {_STEPPED: ""} if state_dict.get("num_steps", 0) else {}

    def _find_state(self, state_dict: Mapping[str, Any], plans: Iterable[Plan]) -> Found:
        num_steps = int(state_dict.get("num_steps", self.num_steps))
        return num_steps, find_layers(plans, self._adapter, state_dict.get("layers", {}))

    @torch.no_grad()
    def _restore(self, found: Found, binding: Binding, *, stepped: bool) -> None:
        self._monitor.num_steps, moves = found
        if stepped:
            binding.unverified.fresh.clear()
            binding.found.away.clear()
        for target, value in moves:
            target.copy_(value)

    def export_anchors(self) -> dict[str, HeldAnchor]:
        """This rank's shards of the anchors, for a copy of the optimizer in another place."""
        return dict(self._binding.held) if self._binding is not None else {}

    def adopt(self, held: Mapping[str, HeldAnchor], state: Mapping[str, Any]) -> None:
        """Bind with anchors that `export_anchors` gave, instead of taking new ones."""
        self._seed = dict(held)
        self._loaded = dict(state)
        self._bind(None, required=False)
