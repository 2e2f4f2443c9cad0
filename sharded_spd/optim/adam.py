"""AdamSPD: Adam whose layers are projected toward their anchors; a full `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim.adam import Adam, adam

from sharded_spd.binding.records import Binding
from sharded_spd.config.resolve import GroupResolver, GroupSpec, Source
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.engines.plain import ParameterAdapter
from sharded_spd.errors import BindingError
from sharded_spd.optim.fused_adam import Lists, fused_adam, may_fuse
from sharded_spd.optim.param_groups import (
    LET_GO,
    check_fingerprint,
    compare_groups,
    count_layers,
    fuses_decay,
    group_rests,
    listed,
    num_layers,
    take_group,
    tensors_in,
    under_own_names,
)
from sharded_spd.projection.projector import Projector
from sharded_spd.projection.step import Step
from sharded_spd.rules.base import Rule
from sharded_spd.sharding.collectives import agree, agree_and_tell


class AdamSPD(Adam):
    """Adam (Kingma and Ba, 2015) with Selective Projection Decay (arXiv 2411.01713) of every layer.

    After Adam's tentative step w~: w <- w~ - lambda * r * (w~ - w0) where c = -<g, w - w0> < 0, else w~;
    r = clamp((|w~ - w0| - |w - w0|) / |w~ - w0|, 0, 1). lambda 0 is exactly `torch.optim.Adam`. Parameters
    may be plain tensors or DTensors (FSDP2, HSDP, tensor parallelism); each rank keeps its shard of the
    anchor only.

    Args:
        params: tensors, (name, tensor) pairs, or groups; a group may hold "pre", a list of anchors, or None
            for zero, and its own weight_decay, max_pull, anchor and rule.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: lambda, the strength of the pull; not multiplied by lr. While it is the number 0 in a
            group, the group is torch's Adam to the last bit and ignores its anchors: no memory, no check. The
            snapshot is taken when lambda is first positive; if the weights have moved since they were bound,
            the step raises. A warm-up of lambda from 0 needs a checkpoint's path, or lambda as a 0-d tensor,
            which may always be positive and so keeps the snapshot.
        amsgrad: use the maximum of the second moments.
        maximize: ascend.
        foreach: torch's multi-tensor implementation of Adam's step.
        capturable: allow capture in a CUDA graph.
        anchor: "snapshot" (the weights now), "deferred" (bound later by `bind()`), "zero", the path of a
            safetensors checkpoint, or an `AnchorStore`.
        rule: "spd", "l2sp", "decay" (torch AdamW's decay, for a new head), "none", another rule's name, or an
            instance of a rule: `FTP(k=0.3)`. For rules without a strength weight_decay is AdamW's decay.
        fused: None: Adam's step and the projection's sums in one pass, in float32 and float64, where kernels
            exist; True: in half precision, too, else torch's fused implementation; False: torch's loop.
        model: names the parameters that come without names.
        max_pull: upper bound of the pull lambda * r; 1.0 never overshoots the anchor.

    Raises:
        ValueError: a hyper-parameter is out of range, a rule is unknown, or an anchor does not fit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        anchor: Source = "snapshot",
        rule: str | Rule = "spd",
        fused: bool | None = None,
        model: Module | None = None,
        max_pull: float | None = None,
    ) -> None:
        self._own_defaults = {"max_pull": max_pull, "anchor": anchor, "rule": rule}
        self._specs: list[GroupSpec] = []
        self._deferred = False
        self._num_bound = 0
        self._refused: Exception | None = None
        self._projector: Projector | None = None
        # Comes first: it reshards an FSDP2 model, so that a lazy model.named_parameters() yields shards.
        adapter = ParameterAdapter([self], model)
        self._adapter = adapter
        params, failure = listed(params)

        def construct() -> None:
            if failure is not None:
                raise failure
            super(AdamSPD, self).__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                amsgrad,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                fused=fused,
            )

        agree(construct, adapter.groups_of(tensors_in(params)))
        self._projector = Projector(adapter, GroupResolver(self, self._specs), deferred=self._deferred)
        self._after_bind()

    @property
    def projector(self) -> Projector:
        """Metrics, rule state (a `Stateful`) and binding."""
        if self._projector is None:
            raise BindingError("this AdamSPD is not constructed yet")
        return self._projector

    def bind(self, model: Module | None = None) -> None:
        """Bind the anchors, or re-bind after sharding; see `Projector.bind`."""
        # If a checkpoint was loaded before the first binding, the groups show its fingerprints.
        self.projector.bind(model, vet=None if self.projector.bound else self._vet)
        self._after_bind()

    def _vet(self, binding: Binding) -> None:
        prints = self.projector.group_fingerprints(self, self._adapter.replicas, binding)
        check = partial(compare_groups, self.param_groups, prints, self.param_groups, self._specs)
        results = agree(check, self._adapter.agreement_groups)
        for spec, unchecked in zip(self._specs, results, strict=True):
            spec.unchecked = unchecked

    def move_to(self, adapter: EngineAdapter, *, per_step: bool = False) -> Projector:
        """Project the tensors that an engine made of the parameters; bound anchors are cut to its shards.

        Called by `attach(engine)`.
        """
        names = {fqn: adapter.names.get(param, fqn) for fqn, param in self._adapter.params.items()}
        held = {names[fqn]: anchor for fqn, anchor in self.projector.export_anchors().items()}
        projector = Projector(adapter, GroupResolver(self, self._specs), deferred=True, per_step=per_step)
        projector.adopt(held, {})
        self._projector = projector
        self._after_bind()
        return projector

    def _after_bind(self) -> None:
        """Show the fingerprints in the groups, and release the user's tensors."""
        if not self.projector.bound:
            return
        self._num_bound, self._refused = len(self._specs), None
        # Inside an optimizer that partitions parameters, a group's layers are spread over all ranks.
        prints = self.projector.group_fingerprints(self, self._adapter.replicas)
        for spec, group, fingerprint in zip(self._specs, self.param_groups, prints, strict=True):
            spec.shown["anchor_fingerprint"] = fingerprint
            group.update(spec.shown)
            if spec.pre is not None:  # bound: keep this rank's shard, release the user's tensors
                spec.pre, spec.anchor = None, "snapshot"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and bind its anchors at once if the others are bound; a failure changes nothing.

        If layers are split over ranks, binding waits until all ranks step next: a rank that alone adds a
        group must not wait for the others. The anchors are then the weights of that moment, and a failure
        removes the group again; a call refused on some ranks fails there on all.

        Raises:
            ValueError: lambda is negative, a rule is unknown, or a list has another length than `params`.
        """
        if self._projector is None or not self._projector.bound:
            self._take_group(param_group)
            return
        if self._projector.meets:
            self._refused = None
            try:
                self._take_group(param_group)
            except Exception as error:
                self._refused = error
                raise
            return
        agree(lambda: self._take_group(param_group), self._adapter.agreement_groups)
        self._bind_added()

    def _take_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **self._own_defaults, **param_group}
        spec = take_group(group, len(self.param_groups), self._adapter.names, self._specs)
        super().add_param_group(group)
        self._specs.append(spec)
        self._deferred |= spec.shown["anchor"] == "deferred"

    def _bind_added(self) -> None:
        """Bind the groups added since the last binding, or remove them again."""
        added, refused = len(self._specs) > self._num_bound, self._refused
        if not (added or refused) or not self.projector.bound:
            return
        self._refused = None
        try:
            if self.projector.meet_to_bind(added=added, refused=refused):
                self.bind()
        except Exception:
            del self.param_groups[self._num_bound :], self._specs[self._num_bound :]
            raise

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam, and the projection.

        Raises:
            BindingError: there are gradients but no bound anchors, or parameters were swapped.
            UnsupportedError: a gradient is sparse.
            The failure of any rank that shares a layer; other ranks name that rank.
        """
        loss = None
        self._bind_added()
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._keep_groups()
            fuse = may_fuse(self)
        except Exception as error:
            self.projector.break_off(self, error)
        decays = frozenset(
            id(group)
            for spec, group in zip(self._specs, self.param_groups, strict=False)
            if group["fused"] and fuses_decay(spec, group)
        )
        step = self.projector.before_step(self, sums_later=fuse, base_decays=decays)
        try:
            self._step_base(step if fuse else None, decays)
        except Exception as error:
            self.projector.break_off(self, error)
        self.projector.after_step(self)
        return loss

    def _step_base(self, step: Step | None, decays: Set[int]) -> None:
        """Adam's step, by the kernels with the sums of `step` where they can; AdamW's for `decays`."""
        done: set[Tensor] = set()
        gathered = [self._gather(group) for group in self.param_groups]
        if step is not None:
            done = fused_adam(self, step, gathered)
            step.add_before()
        for group, lists in zip(self.param_groups, gathered, strict=True):
            self._adam(group, lists, done, decays=id(group) in decays)

    def _keep_groups(self) -> None:
        """Check and restore keys that an outer optimizer copied into the groups, e.g. from a checkpoint."""
        for g, (spec, group) in enumerate(zip(self._specs, self.param_groups, strict=False)):
            shown = spec.shown.get("anchor_fingerprint")
            if shown is not None and spec.unchecked is not None and not group_rests(spec, group):
                check_fingerprint(spec.unchecked, shown, group=g, num_params=count_layers(group))
                spec.unchecked = None
            copied = group.get("anchor_fingerprint", shown)
            if shown is not None and copied not in (shown, None) and self._adapter.replicas is not None:
                check_fingerprint(copied, shown, group=g, num_params=num_layers(shown))
            # ZeroRedundancyOptimizer and OSS copy the full group's keys to the shares before each step.
            group.update(spec.shown)
            if "pre" in group:
                group["pre"] = LET_GO

    def _gather(self, group: dict[str, Any]) -> Lists:
        """A group's lists; creates missing state."""
        lists: Lists = [[] for _ in range(6)]
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        return lists

    def _adam(self, group: dict[str, Any], lists: Lists, done: set[Tensor], *, decays: bool) -> None:
        if done and done.issuperset(lists[0]):
            return
        if done:
            keep = [i for i, param in enumerate(lists[0]) if param not in done]
            lists = [[column[i] for i in keep] if column else column for column in lists]
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"] if decays else 0.0,  # else it is the projection's
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=decays,
        )

    def state_dict(self) -> dict[str, Any]:
        """As Adam's; a rule that has state adds it under "projector"."""
        result = super().state_dict()
        rule_state = self.projector.state_dict()
        return {**result, "projector": rule_state} if rule_state["layers"] else result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, group scalars and rule state; rule and anchor stay those of this optimizer.

        Hooks work as torch's do: pre-hooks may change the checkpoint, in any format; post-hooks see the final
        groups. A refused checkpoint changes nothing. The anchor of a group with lambda 0 is compared once
        lambda is positive.

        Raises:
            AnchorError: the checkpoint was written with another anchor.
        """
        finish: list[Callable[[], None]] = []
        handles = [
            self.register_load_state_dict_pre_hook(lambda _, saved: finish.append(self._prepare_load(saved))),
            self.register_load_state_dict_post_hook(lambda _: finish.pop()(), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Check a checkpoint before torch loads it; the returned function corrects what torch has loaded."""
        self._bind_added()
        ranks = self._adapter.agreement_groups
        own_state = state_dict.get("projector")
        unchecked, words = agree_and_tell(
            lambda: self._check_saved(state_dict),
            ranks,
            lambda _: {} if own_state is None else {"projector": ""},
        )
        groups = state_dict["param_groups"]
        strengths = [{k: group[k] for k in ("weight_decay", "max_pull")} for group in self.param_groups]
        if own_state is None and words:
            own_state = {}
        restore: Callable[[], None] | None = None
        if own_state is not None and self.projector.bound:
            names = {param: fqn for fqn, param in self._adapter.params.items()}
            if own_state.get("fingerprint", "") not in ("", self.projector.fingerprint):
                own_state = under_own_names(own_state, groups, self.param_groups, self._specs, names)
            restore = self.projector.prepare_load(own_state)
        elif own_state is not None:
            restore = partial(self.projector.load_state_dict, own_state)

        def finish() -> None:
            for spec, strength, group, saved, left in zip(
                self._specs, strengths, self.param_groups, groups, unchecked, strict=True
            ):
                # In a plain Adam's checkpoint, weight_decay is not lambda.
                group.update({**spec.shown, **({} if "rule" in saved else strength)})
                spec.unchecked = left
            if restore is not None:
                restore()

        return finish

    def _check_saved(self, state_dict: Mapping[str, Any]) -> list[str | None]:
        """Check that torch will accept it and that its anchors are these; see `compare_groups`."""
        if not isinstance(state_dict.get("state"), Mapping):
            raise TypeError("got a checkpoint without 'state'; wanted what an optimizer's state_dict() gives")
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        current = [len(group["params"]) for group in self.param_groups]
        if saved != current:
            raise ValueError(
                f"got a checkpoint with parameter groups of {saved} parameters; wanted {current}: build the "
                "optimizer with the parameter groups that it was saved with"
            )
        if not self.projector.bound:
            return [None] * len(self._specs)
        prints = [spec.shown["anchor_fingerprint"] for spec in self._specs]
        return compare_groups(state_dict["param_groups"], prints, self.param_groups, self._specs)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: Adam's, and this rank's shards of the anchors."""
        attributes = {name: getattr(self, name) for name in ("_own_defaults", "_specs", "_deferred")}
        fqns = self._adapter.names
        names = [[fqns.get(p) for p in group["params"]] for group in self.param_groups]
        bound = self.projector.bound
        held = (self.projector.export_anchors(), self.projector.state_dict()) if bound else None
        return {**super().__getstate__(), **attributes, "_held": held, "_names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or (called by `load_state_dict`) only moments and groups."""
        copied, held, names = "_held" in state, state.pop("_held", None), state.pop("_names", [])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("max_pull", None)
        if copied:
            self._adapter = adapter = ParameterAdapter([self])
            for group, fqns in zip(self.param_groups, names, strict=True):
                adapter.names |= {p: n for p, n in zip(group["params"], fqns, strict=True) if n is not None}
            self._projector = Projector(adapter, GroupResolver(self, self._specs), deferred=True)
            if held is not None:
                self._projector.adopt(*held)
            self._num_bound, self._refused = len(self._specs) if self._projector.bound else 0, None
            if self.defaults.get("fused"):
                self._step_supports_amp_scaling = True
