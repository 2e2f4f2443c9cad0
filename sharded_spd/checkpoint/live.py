"""A training run's live objects to one state and back: through torch's sharded state dicts, by FQN."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.anchors.fingerprint import in_words
from sharded_spd.checkpoint.codec import key_of, merge
from sharded_spd.checkpoint.ranks import Ranks
from sharded_spd.engines.deepspeed import is_of_deepspeed
from sharded_spd.errors import CheckpointError, another_anchor
from sharded_spd.projection.projector import Projector
from sharded_spd.sharding.names import clean_fqns

RNG = "rng"
STATE = "optimizer/state/"


@dataclass(frozen=True, slots=True)
class Live:
    """The objects that a checkpoint is saved from, or loaded into."""

    model: Module
    optimizers: tuple[Optimizer, ...]
    projector: Projector | None
    scheduler: Any
    ranks: Ranks

    @property
    def rank(self) -> int:
        """This process's rank, 0 without a process group."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def parts(self) -> str:
        """A description of the objects to save or load; the same on all ranks."""
        kind = "a DeepSpeed engine" if is_of_deepspeed(self.model) else "a model"
        has = [f"{len(self.optimizers)} optimizer(s)"]
        has += ["a projector"] * (self.projector is not None) + ["a scheduler"] * (self.scheduler is not None)
        return ", ".join([kind, *has])

    def state(self) -> dict[str, Any]:
        """The current state of model, optimizers and projector, as this rank's shards. Collective."""
        with quiet(), _left_alone(self.optimizers):
            return self._state()

    @contextmanager
    def template(self, have: Set[str]) -> Iterator[dict[str, Any]]:
        """A state to read into; for optimizers, only the state of the parameters `have`. Collective.

        Inside, gradients are removed, and parameters that were saved with state may have it, frozen or not.
        If the block fails, the optimizers are restored.
        """
        with quiet(), _emptied(self.optimizers, [p for n, p in self._named() if _has(have, n)]):
            state = self._state()
            if self.optimizers:
                states = state["optimizer"]["state"]
                state["optimizer"]["state"] = {fqn: own for fqn, own in states.items() if fqn in have}
            yield state

    def _state(self) -> dict[str, Any]:
        agree, model, optimizers = self.ranks.agree, self.model, list(self.optimizers)
        state: dict[str, Any] = {
            "model": agree(lambda: dict(get_model_state_dict(model)), "the model's state")
        }
        if optimizers:
            what = "the optimizer's state"
            state["optimizer"] = agree(lambda: dict(get_optimizer_state_dict(model, optimizers)), what)
        if self.projector is not None:
            state["projector"] = agree(self.projector.state_dict, "the projector's state")
        return state

    def restore(self, state: Mapping[str, Any], failed: str) -> None:
        """Load such a state; `failed` is the beginning of the message if it does not fit. Collective."""
        agree, projector = self.ranks.agree, self.projector
        with quiet():
            agree(lambda: set_model_state_dict(self.model, state["model"]), failed)
            if self.optimizers:
                agree(lambda: self._restore_optimizers(state["optimizer"]), failed)
        if projector is not None:
            agree(lambda: projector.load_state_dict(state["projector"]), failed)

    def _restore_optimizers(self, state: dict[str, Any]) -> None:
        # Not strict: a parameter that never had a gradient has no state.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.model, list(self.optimizers), optim_state_dict=state, options=options)
        self._keep_dtypes(state["state"])

    def _keep_dtypes(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore dtypes: optimizers cast all loaded state to the parameter's dtype, even float32 state."""
        names = {param: name for name, param in self._named()}
        for optimizer in self.optimizers:
            for param, own in optimizer.state.items():
                for key, value in states.get(names.get(param, ""), {}).items():
                    now = own.get(key)
                    if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                        own[key] = value.to(now.device)

    def _named(self) -> list[tuple[str, Tensor]]:
        found = list(self.model.named_parameters())
        return list(zip(clean_fqns([name for name, _ in found]), (p for _, p in found), strict=True))

    def anchors(self) -> dict[str, list[str]]:
        """The fingerprint of every layer's anchor."""
        if self.projector is None or not self.projector.bound:
            return {}
        return {fqn: in_words(prints) for fqn, prints in self.projector.fingerprints.items()}

    def check_anchors(self, saved: Any) -> None:
        """Compare this run's anchors with those in a checkpoint.

        Raises:
            AnchorError: some differ; names them.
        """
        own = self.anchors()
        if not isinstance(saved, Mapping) or not saved or not own:
            return
        changed = [fqn for fqn in own if fqn in saved and saved[fqn] != own[fqn]]
        differing = changed or sorted(own.keys() ^ saved.keys())
        if differing:
            wanted, got = (_shown(anchors.get(differing[0])) for anchors in (saved, own))
            raise another_anchor(
                f"{len(differing)} of {len(own)} layers ({', '.join(differing[:5])})",
                "the checkpoint's",
                wanted=wanted,
                got=f"{got} for {differing[0]}",
                advice="give this run the same pre-trained checkpoint as anchor (another revision or a "
                "fine-tuned one has the same names and shapes)",
            )


def _shown(words: Any) -> str:
    """A layer's fingerprint in a message; in a damaged checkpoint it may be of any type."""
    if words is None:
        return "none"
    return "".join(map(str, words)) if isinstance(words, Sequence) else str(words)


def states_in(stored: Metadata, values: Mapping[str, Any]) -> set[str]:
    """The FQNs of the parameters with optimizer state in a checkpoint."""
    states = values["optimizer"].get("state") if "optimizer" in values else None
    known = {key_of(key) for key in states} if isinstance(states, dict) else set()
    found = set(known)
    for name in stored.state_dict_metadata:
        if name.startswith(STATE):
            parts = name.removeprefix(STATE).split("/")
            # Parameters of other ranks only (experts) are in no value, and layer names may contain slashes.
            possible = {"/".join(parts[:n]) for n in range(1, len(parts))}
            found |= possible if known.isdisjoint(possible) else set()
    return found


def check_fits(wanted: Mapping[str, Any], stepped: Iterable[str], stored: Metadata, where: object) -> None:
    """Check that a checkpoint has every tensor to be loaded, and no other of the same model and parameters.

    `stepped`: the optimizer's parameters by FQN.

    Raises:
        CheckpointError: lists all mismatches.
    """
    found: Mapping[str, Any] = stored.state_dict_metadata
    problems = [f"{name}: missing" for name in wanted if name not in found]
    for name, tensor in wanted.items():
        if name in found and tuple(found[name].size) != tuple(tensor.size()):
            problems.append(f"{name}: has shape {list(found[name].size)}, wanted {list(tensor.size())}")
        elif name in found and found[name].properties.dtype != tensor.dtype:
            problems.append(f"{name}: is {found[name].properties.dtype}, wanted {tensor.dtype}")
    known = tuple(f"{STATE}{fqn}/" for fqn in stepped)
    for name in found:
        if name not in wanted and name.startswith(("model/", *known)):
            whose = "model" if name.startswith("model/") else "optimizer"
            problems.append(f"{name}: the {whose} has no such tensor")
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        listing = "\n  ".join(problems[:10])
        raise CheckpointError(
            f"{where}: does not fit this run in {len(problems)} place(s); wanted the model and the optimizer "
            f"that wrote it:\n  {listing}{more}"
        )


def check_groups(own: Sequence[Any], saved: Any, where: object) -> None:
    """Check that the optimizer's param groups are the saved ones, in any order.

    Raises:
        CheckpointError: parameters are grouped differently, or weight_decay has another meaning.
    """
    try:
        theirs = [frozenset(group["params"]) for group in saved]
        ruled = ["rule" in group for group in saved]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{where}: is damaged: its param groups cannot be read ({error})") from None
    ours = [frozenset(group["params"]) for group in own]
    all_ours, all_theirs = frozenset().union(*ours), frozenset().union(*theirs)
    for g, (group, params) in enumerate(zip(own, ours, strict=True)):
        known = params & all_theirs
        match = [i for i, other in enumerate(theirs) if other & all_ours == known]
        if known and not match:
            raise CheckpointError(
                f"{where}: param group {g} ({', '.join(sorted(params)[:3])}, ...) was cut otherwise when "
                "it was saved; wanted the same param groups"
            )
        for key, value in group.items() if known else ():
            if key != "params" and not _alike(value, saved[match[0]].get(key, value)):
                raise CheckpointError(
                    f"{where}: is damaged: {key} of param group {g} is {saved[match[0]][key]!r:.80}"
                )
        if known and ruled[match[0]] and "rule" not in group:
            raise CheckpointError(
                f"{where}: was written by AdamSPD, whose weight_decay is lambda; wanted AdamSPD, got another "
                "optimizer"
            )


def _alike(own: Any, saved: Any) -> bool:
    """Whether an encoded setting may replace another: a number a number, and so on."""
    if isinstance(own, bool):
        return saved is None or isinstance(saved, bool)
    if isinstance(own, (int, float)):
        tagged = isinstance(saved, dict) and saved.keys() <= {"$tensor", "$float"}
        return tagged or (isinstance(saved, (int, float)) and not isinstance(saved, bool))
    if isinstance(own, dict) and "$tuple" in own:
        theirs = saved.get("$tuple") if isinstance(saved, dict) else None
        if not isinstance(theirs, list) or len(theirs) != len(own["$tuple"]):
            return False
        return all(_alike(x, y) for x, y in zip(own["$tuple"], theirs, strict=True))
    return True


def merge_groups(own: Sequence[Any], saved: Sequence[Any]) -> list[Any]:
    """The optimizer's encoded param groups with the saved values, and the further keys of the saved ones."""
    merged = []
    for group in own:
        params = set(group["params"])
        match: Mapping[str, Any] = next((other for other in saved if params & set(other["params"])), {})
        merged.append({**match, **merge(group, {**match, "params": group["params"]})})
    return merged


@contextmanager
def _left_alone(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Keep torch from stepping an optimizer to create its state: it does not if there is a gradient."""
    lent: list[Tensor] = []
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not optimizer.state and params and all(p.grad is None for p in params):
            params[0].grad = torch.zeros_like(params[0])
            lent.append(params[0])
    try:
        yield
    finally:
        for param in lent:
            param.grad = None


@contextmanager
def _emptied(optimizers: Sequence[Optimizer], thawed: Sequence[Tensor]) -> Iterator[None]:
    """Optimizers without state, parameters without gradients, and `thawed` ones not frozen."""
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    frozen = [p for p in thawed if not p.requires_grad]
    before = [(o, dict(o.state), [dict(group) for group in o.param_groups]) for o in optimizers]
    for p in params:
        p.grad = None
    for p in frozen:
        p.requires_grad_(True)
    for optimizer in optimizers:
        optimizer.state.clear()
    try:
        yield
    except BaseException:
        for optimizer, state, groups in before:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, old in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(old)
        raise
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _has(states: Set[str], name: str) -> bool:
    """Whether a parameter may have state: FSDP1's flat parameters have other names and may hold any."""
    return name in states or "_flat_param" in name


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """One, several or none, as a tuple."""
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's warnings about its own code: FSDP1's state dicts, a save without ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", message=".*ShardedTensor.*", category=FutureWarning)
        yield
