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
        weight_decay: lambda, the strength of the pull; not multiplied by lr. While a group's is the number 0,
            it is torch's Adam to the last bit and asks nothing of its anchors: no memory, no check. The
            snapshot is taken when lambda is first positive, of weights that have not moved since they were
            bound; where they have, the step raises. A warm-up of lambda from 0 needs the path of a
            checkpoint, or lambda as a 0-d tensor, which may always be positive and so keeps the snapshot.
        amsgrad: use the maximum of the second moments.
        maximize: ascend.
        foreach: torch's multi-tensor implementation of Adam's step.
        capturable: allow capture in a CUDA graph.
        anchor: "snapshot" (the weights now), "deferred" (bound later by `bind()`), "zero", the path of a
            safetensors checkpoint, or an `AnchorStore`.
        rule: "spd", "l2sp", "decay" (torch AdamW's decay, for a new head), "none", another rule's name, or an
            instance of a rule: `FTP(k=0.3)`. For rules without a strength weight_decay is AdamW's decay.
        fused: None: Adam's step and the sums of the projection in one pass, in float32 and float64, where
            there are kernels; True: in half precision, too, else torch's fused implementation; False: torch's
            loop.
        model: gives the parameters their names, where they come without.
        max_pull: upper bound of the pull lambda * r; 1.0 never overshoots the anchor.

    Raises:
        ValueError: for a hyper-parameter out of range, an unknown rule, or an anchor that does not fit.
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
        # Made first: it reshards an FSDP2 model, so that a lazily read model.named_parameters() gives shards.
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
        """Bind the anchors, or bind anew after sharding; see `Projector.bind`."""
        # A checkpoint may have been loaded before the first binding: the groups show its fingerprints then.
        self.projector.bind(model, vet=None if self.projector.bound else self._vet)
        self._after_bind()

    def _vet(self, binding: Binding) -> None:
        prints = self.projector.group_fingerprints(self, self._adapter.replicas, binding)
        check = partial(compare_groups, self.param_groups, prints, self.param_groups, self._specs)
        for spec, left in zip(self._specs, agree(check, self._adapter.agreement_groups), strict=True):
            spec.unchecked = left

    def move_to(self, adapter: EngineAdapter, *, per_step: bool = False) -> Projector:
        """Project what an engine made of the parameters; bound anchors move along, cut to its shards.

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
        """Show the fingerprints, and let go of what was given."""
        if not self.projector.bound:
            return
        self._num_bound, self._refused = len(self._specs), None
        # Inside of an optimizer that shares the parameters out, a group's layers are on all ranks together.
        prints = self.projector.group_fingerprints(self, self._adapter.replicas)
        for spec, group, fingerprint in zip(self._specs, self.param_groups, prints, strict=True):
            spec.shown["anchor_fingerprint"] = fingerprint
            group.update(spec.shown)
            if spec.pre is not None:  # bound: this rank's shard is kept, the user's tensors are let go
                spec.pre, spec.anchor = None, "snapshot"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and bind its anchors at once where the others are bound; what fails changes nothing.

        Where layers are split over ranks, it is bound when all of them step next: a rank that adds a group
        alone must not wait for the others. Its anchors are then the weights of that moment, and what fails
        there takes the group out again; a call that was refused on some of the ranks fails there on all.

        Raises:
            ValueError: for a negative lambda, an unknown rule, or lists of another length than `params`.
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
        """Bind the groups that were added since the last binding, or take them out again."""
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
            BindingError: where gradients are there and the anchors are not bound, or parameters were swapped.
            UnsupportedError: for a sparse gradient.
            What failed on any rank that shares a layer; on the others with that rank's number.
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
        """Adam's step; that of what the kernels can together with the sums of `step`, AdamW's of `decays`."""
        done: set[Tensor] = set()
        gathered = [self._gather(group) for group in self.param_groups]
        if step is not None:
            done = fused_adam(self, step, gathered)
            step.add_before()
        for group, lists in zip(self.param_groups, gathered, strict=True):
            self._adam(group, lists, done, decays=id(group) in decays)

    def _keep_groups(self) -> None:
        """What an optimizer around this one has copied into the groups, out of a checkpoint it may be."""
        for g, (spec, group) in enumerate(zip(self._specs, self.param_groups, strict=False)):
            own = spec.shown.get("anchor_fingerprint")
            if own is not None and spec.unchecked is not None and not group_rests(spec, group):
                check_fingerprint(spec.unchecked, own, group=g, num_params=count_layers(group))
                spec.unchecked = None
            theirs = group.get("anchor_fingerprint", own)
            if own is not None and theirs not in (own, None) and self._adapter.replicas is not None:
                check_fingerprint(theirs, own, group=g, num_params=num_layers(own))
            # ZeroRedundancyOptimizer and OSS copy the whole group's keys to the shares before each step.
            group.update(spec.shown)
            if "pre" in group:
                group["pre"] = LET_GO

    def _gather(self, group: dict[str, Any]) -> Lists:
        """Of a group; state is made where missing."""
        lists: Lists = [[] for _ in range(6)]
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        return lists

    def _adam(self, group: dict[str, Any], lists: Lists, done: set[Tensor], *, decays: bool) -> None:
        if done and done.issuperset(lists[0]):
            return
        if done:
            keep = [i for i, param in enumerate(lists[0]) if param not in done]
            lists = [[own[i] for i in keep] if own else own for own in lists]
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
        own = self.projector.state_dict()
        return {**result, "projector": own} if own["layers"] else result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments, group scalars and rule state; rule and anchor stay those of this optimizer.

        Hooks see and may change what torch's would: those before it the checkpoint in any format, those after
        it the groups as they are in the end. A checkpoint that is refused changes nothing. One of a group
        whose lambda is 0 is compared once it is not.

        Raises:
            AnchorError: where the checkpoint was written with another anchor.
        """
        found: list[Callable[[], None]] = []
        handles = [
            self.register_load_state_dict_pre_hook(lambda _, saved: found.append(self._prepare_load(saved))),
            self.register_load_state_dict_post_hook(lambda _: found.pop()(), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Check what is to be loaded; what comes back puts in order what torch has loaded of it."""
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
                # Of a plain Adam's checkpoint the weight_decay is another thing than lambda.
                group.update({**spec.shown, **({} if "rule" in saved else strength)})
                spec.unchecked = left
            if restore is not None:
                restore()

        return finish

    def _check_saved(self, state_dict: Mapping[str, Any]) -> list[str | None]:
        """Whether torch will take it, and its anchors are these; see `compare_groups`."""
        if not isinstance(state_dict.get("state"), Mapping):
            raise TypeError("got a checkpoint without 'state'; wanted what an optimizer's state_dict() gives")
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group["params"]) for group in self.param_groups]
        if saved != own:
            raise ValueError(
                f"got a checkpoint whose parameter groups have {saved} parameters; wanted {own}: build the "
                "optimizer with the parameter groups that it was saved with"
            )
        if not self.projector.bound:
            return [None] * len(self._specs)
        prints = [spec.shown["anchor_fingerprint"] for spec in self._specs]
        return compare_groups(state_dict["param_groups"], prints, self.param_groups, self._specs)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: Adam's, and this rank's shards of the anchors."""
        own = {name: getattr(self, name) for name in ("_own_defaults", "_specs", "_deferred")}
        known = self._adapter.names
        names = [[known.get(p) for p in group["params"]] for group in self.param_groups]
        bound = self.projector.bound
        held = (self.projector.export_anchors(), self.projector.state_dict()) if bound else None
        return {**super().__getstate__(), **own, "_held": held, "_names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or (called by `load_state_dict`) only moments and groups."""
        copied, held, names = "_held" in state, state.pop("_held", None), state.pop("_names", [])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("max_pull", None)
        if copied:
            self._adapter = adapter = ParameterAdapter([self])
            for group, own in zip(self.param_groups, names, strict=True):
                adapter.names |= {p: n for p, n in zip(group["params"], own, strict=True) if n is not None}
            self._projector = Projector(adapter, GroupResolver(self, self._specs), deferred=True)
            if held is not None:
                self._projector.adopt(*held)
            self._num_bound, self._refused = len(self._specs) if self._projector.bound else 0, None
            if self.defaults.get("fused"):
                self._step_supports_amp_scaling = True
