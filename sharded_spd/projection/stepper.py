"""The steps of a projector: each is finished on all ranks or on none.

`before_step` and `after_step` surround the base optimizer's own step. A failure on one rank between two
reductions is kept, and reported in the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from sharded_spd.binding import warnings as warn
from sharded_spd.binding.checks import check_unbound
from sharded_spd.binding.records import Binding
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import AnchorError, BindingError
from sharded_spd.projection.metrics import Monitor
from sharded_spd.projection.reduction import Evidence, Heard, Verdict, reduce_together_
from sharded_spd.projection.rule_state import move_layers
from sharded_spd.projection.slices import StepPlan
from sharded_spd.projection.step import Step
from sharded_spd.sharding.layout import BoundShard

Plans = dict[tuple[str, ...], StepPlan]
"""Plans by the layers that step together."""

Calls = dict[Optimizer, list[StepPlan]]
"""For each optimizer, the plans of its calls within one engine step, in order."""


class Stepper:
    """Runs the steps of one engine's optimizers; `per_step`: one reduction per engine step."""

    def __init__(self, adapter: EngineAdapter, monitor: Monitor, *, per_step: bool) -> None:
        self._adapter = adapter
        self._monitor = monitor
        self._per_step = per_step
        self._binding: Binding | None = None
        self._plans: Plans = {}
        self._calls: Calls = {}
        self._turns: dict[Optimizer, int] = {}
        self._steps: dict[Optimizer, Step] = {}
        self._waiting: list[Step] = []
        self._verdicts: list[Verdict] = []
        self._failure: Exception | None = None

    def _clear(self) -> None:
        """Drop the binding and the steps under way."""
        for container in (self._steps, self._waiting, self._verdicts, self._calls, self._plans):
            container.clear()
        self._binding = None

    @property
    def bound(self) -> bool:
        """Whether the anchors are bound."""
        return self._binding is not None

    @property
    def meets(self) -> bool:
        """Whether a step sums over ranks."""
        return self._binding is not None and bool(self._binding.layout.scopes)

    def _require(self) -> Binding:
        if self._binding is None:
            raise BindingError(
                "the anchors are not bound yet; call bind() after sharding and loading the weights"
            )
        return self._binding

    def _plan(
        self,
        shards: Sequence[BoundShard],
        binding: Binding,
        plans: Plans,
        renamed: Mapping[str, str],
    ) -> StepPlan:
        """The plan in `plans` for these shards; a new one is added and takes over the layers' state."""
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in plans:
            device = shards[0].tensor.device if shards else torch.device("cpu")
            plan = StepPlan(fqns, binding, device)
            plan.prepare_shard_states(binding, shards)
            move_layers([*self._plans.values(), *plans.values()], [plan], binding.layout.shapes, renamed)
            plans[fqns] = plan
        return plans[fqns]

    @torch.no_grad()
    def before_step(
        self, optimizer: Optimizer, *, sums_later: bool = False, base_decays: Set[int] = frozenset()
    ) -> Step | None:
        """Take the statistics before `optimizer` steps; its gradients must be ready.

        A failure on this rank is raised here if no rank waits for it, else when all ranks know: at the first
        reduction of the step. With `sums_later` the caller takes the sums of the returned step (None:
        unbound). `base_decays` are the ids of the param groups that the base step decays itself.

        Raises:
            BindingError: unbound with gradients, or a parameter was swapped or added since `bind()`.
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
        step.before(shards)
        if step.failure is not None and not step.meets:
            raise step.failure
        if step.starts:
            try:
                self._start(step)
            except Exception:
                step.release()
                raise
        if not sums_later:
            step.add_before()
        self._steps[optimizer] = step
        if step.moves and self._binding.found.differs_from_weights:
            warn.about_start(self._binding, shards)
        return step

    def _begin(self, optimizer: Optimizer) -> tuple[Step, Sequence[BoundShard]]:
        """A step of the shards that `optimizer` holds now; if they are unknown, of those it should step."""
        failure, shards = self._failure, []
        calls = self._calls.get(optimizer, [])
        plan = calls[self._turns.get(optimizer, 0) % len(calls)] if calls else None
        try:
            if failure is None:
                shards = list(self._adapter.bind(optimizer, grads=True))
                plan = self._plan_of(shards)
        except Exception as error:  # reported in the step's reduction
            failure = error
        if plan is None:
            raise failure or BindingError(f"this {type(optimizer).__name__} was not bound; call bind()")
        if any(plan is step.plan for step in self._waiting):
            self._project()
        step = Step(plan, optimizer)
        if failure is not None:
            step.fail(failure)
        return step, shards

    def _plan_of(self, shards: Sequence[BoundShard]) -> StepPlan:
        fqns = tuple(piece.layer for shard in shards for piece in shard.slices)
        if fqns not in self._plans and self._require().layout.scopes:
            raise BindingError(
                f"the optimizer steps {len(fqns)} layers that it did not step together when the anchors were "
                "bound: a param group was added, removed or changed; call bind() on every rank"
            )
        return self._plan(shards, self._require(), self._plans, {})

    def _start(self, step: Step) -> None:
        """Reduce what the step needs ahead of the base step, if anything."""
        if not step.starts:
            return
        heard = reduce_together_([step.early_reduction()])
        step.starts = False
        self._hear(heard, [], [step])
        step.edit()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Finish what `before_step` began: reduce, find s, pull; log where it is due.

        Raises:
            AnchorError: weights were loaded after the snapshot; at the first real step, and at all later
            ones.
            BindingError: the optimizer stepped without `before_step`: it never called its closure.
            ConfigError: learning rate, lambda or pull limit differ between ranks that share a layer.
            The failure of any rank that shares a layer; other ranks name that rank.
        """
        binding = self._binding
        if binding is None:
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
        step.add_after()
        self._waiting.append(step)
        last = self._adapter.boundary(optimizer)
        # Without a scope there is nothing to reduce, and so nothing to wait for.
        if last or not self._per_step or not binding.layout.scopes:
            self._project()
        if last:
            self._turns.clear()
            self._monitor.step(list(self._plans.values()), binding.norms)

    def break_off(self, optimizer: Optimizer, error: Exception) -> NoReturn:
        """Raise `error`, which stops this rank's step, on every rank that waits for it.

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
        """Reduce the waiting steps with `broken`, and those that other ranks will have taken by then."""
        self._waiting += broken
        if self._per_step:
            done = {id(step.plan) for step in self._waiting}
            rest = [
                (optimizer, plan)
                for optimizer, calls in self._calls.items()
                for plan in calls
                if id(plan) not in done
            ]
            for optimizer, plan in rest:
                step = Step(plan, optimizer)
                step.fail(BindingError("this rank ended its step early"), absent=True)
                self._waiting.append(step)
        self._project(now=now)

    def _project(self, *, now: bool = False) -> None:
        """Finish the waiting inner steps with one reduction."""
        steps, self._waiting = self._waiting, []
        try:
            heard = reduce_together_([step.reduction() for step in steps])
            evidence = [entry for step in steps if step.guarded and (entry := step.evidence())]
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
        if len(steps) > 1:
            self._adapter.rewrite([shard for step in steps[:-1] for shard in step.shards])

    def _pull(self, steps: Sequence[Step], *, told: bool) -> None:
        """Find s and pull. With `told`, a failure here is reported to the other ranks a step later."""
        try:
            for step in steps:
                if step.failure is None:
                    step.pull()
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
        """Raise what any rank reported; on a GPU when the next step begins, unless `now`."""
        failures = sorted((step for step in steps if step.failure is not None), key=lambda step: step.absent)
        if not heard and not evidence and not failures:
            return
        failure = failures[0].failure if failures else None
        numbers = [h.words for h in heard] + [e.rows for e in evidence]
        if numbers and not (numbers[0].is_cuda and _is_capturing()):
            verdict = Verdict(heard, evidence, self._require().unverified)
            if now or not verdict.late:
                self._read(
                    verdict, failure, lambda: {k: v for step in steps for k, v in step.settings().items()}
                )
                return
            self._verdicts.append(verdict)
        if failure is not None:
            if not heard and self.meets:  # reported in the next reduction
                self._failure = failure
            raise failure

    def _read(self, verdict: Verdict, failure: Exception | None = None, settings: Any = dict) -> None:
        try:
            verdict.read(failure, settings)
        except AnchorError as error:
            self._failure = error
            raise

    def _catch_up(self, optimizer: Optimizer | None = None) -> None:
        """Finish the steps under way before something reads or changes them; collective if there are any.

        With `optimizer`, which is about to step, the steps of others go on waiting.
        """
        if self._binding is None:
            return
        if self._verdicts and not _is_capturing():
            verdicts, self._verdicts = self._verdicts, []
            for verdict in verdicts:
                self._read(verdict)
        broken = [step for o, step in self._steps.items() if optimizer in (None, o)]
        if broken:
            for step in broken:
                del self._steps[step.optimizer]
                if step.failure is None:
                    text = "began a step that an exception ended, but another rank finished it"
                    step.fail(BindingError(f"{type(step.optimizer).__name__} {text}"), absent=True)
            broken = [step for step in broken if step.meets]
        if broken:
            self._finish_with(*broken, now=True)
        # An optimizer that is called several times per engine step now steps another part.
        again = len(self._calls.get(optimizer, ())) == 1 if optimizer is not None else True
        if again and any(optimizer in (None, step.optimizer) for step in self._waiting):
            self._project()

    def _meet(self, what: str) -> None:
        """Check that all ranks that share layers do `what`, and none takes a step instead."""
        binding = self._binding
        if binding is None:
            return
        steps = [Step(plan, o) for o, calls in self._calls.items() for plan in calls]
        step = next((step for step in steps if step.meets), None)
        if step is None:
            return
        step.fail(BindingError(f"{what} while another rank took a step; do it on every rank"), absent=True)
        if step.starts:
            self._hear(reduce_together_([step.early_reduction()]), [], [step], now=True)
        elif self._per_step:
            self._finish_with(step, now=True)
        else:
            self._hear(reduce_together_([step.reduction()]), [], [step], now=True)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured: the host must not query an event then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
