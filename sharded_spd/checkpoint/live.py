"""The live objects of a training run as one state, and back: through torch's sharded state dicts, by FQN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.errors import AnchorError, CheckpointError
from sharded_spd.projector import Projector

RNG = "rng"


@dataclass(frozen=True, slots=True)
class Live:
    """What a checkpoint is taken of, or loaded into."""

    model: Module
    optimizers: tuple[Optimizer, ...]
    projector: Projector | None
    scheduler: Any

    @property
    def rank(self) -> int:
        """This process's rank, 0 without a process group."""
        return dist.get_rank() if dist.is_initialized() else 0

    def state(self) -> dict[str, Any]:
        """Model, optimizers and projector, each rank its shards. Collective."""
        with quiet():
            state: dict[str, Any] = {"model": dict(get_model_state_dict(self.model))}
            if self.optimizers:
                state["optimizer"] = dict(get_optimizer_state_dict(self.model, list(self.optimizers)))
        if self.projector is not None:
            state["projector"] = self.projector.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put such a state back. Collective."""
        with quiet():
            set_model_state_dict(self.model, state["model"])
            if self.optimizers:
                set_optimizer_state_dict(
                    self.model, list(self.optimizers), optim_state_dict=state["optimizer"]
                )
        if self.projector is not None:
            self.projector.load_state_dict(state["projector"])

    def anchors(self) -> dict[str, list[str]]:
        """The fingerprint of every layer's anchor."""
        if self.projector is None or not self.projector.bound:
            return {}
        return {
            fqn: [f"{n & (1 << 64) - 1:016x}" for n in p] for fqn, p in self.projector.fingerprints.items()
        }

    def check_anchors(self, saved: Any) -> None:
        """Compare the anchors of this run with those that a checkpoint was written with.

        Raises:
            AnchorError: some differ; it names them.
        """
        own = self.anchors()
        if not isinstance(saved, Mapping) or not saved or not own:
            return
        changed = [fqn for fqn in own if fqn in saved and saved[fqn] != own[fqn]]
        missing = sorted(own.keys() ^ saved.keys())
        if changed or missing:
            kind = "another anchor" if changed else "an anchor on one side only"
            names = ", ".join((changed or missing)[:5])
            raise AnchorError(
                f"{len(changed or missing)} of {len(own)} layers have {kind} than in the run that wrote the "
                f"checkpoint: {names}; give this run the same pre-trained checkpoint as anchor (another "
                "revision or a fine-tuned one has the same names and shapes)"
            )


def check_fits(wanted: Mapping[str, Any], stored: Metadata, where: object) -> None:
    """Whether a checkpoint has every tensor that is to be loaded, in its shape, and no other of the model.

    Raises:
        CheckpointError: it lists what does not fit.
    """
    found: Mapping[str, Any] = stored.state_dict_metadata
    problems = [f"{name}: missing" for name in wanted if name not in found]
    for name, tensor in wanted.items():
        if name in found and tuple(found[name].size) != tuple(tensor.size()):
            problems.append(f"{name}: has shape {list(found[name].size)}, wanted {list(tensor.size())}")
    extra = [name for name in found if name.startswith("model/") and name not in wanted]
    problems += [f"{name}: the model has no such tensor" for name in extra]
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        listing = "\n  ".join(problems[:10])
        raise CheckpointError(
            f"{where}: does not fit this run in {len(problems)} place(s); wanted the model and the optimizer "
            f"that wrote it:\n  {listing}{more}"
        )


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """One, several or none, as a tuple."""
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notices about what it does itself: FSDP1's state dicts, a save without ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", message=".*ShardedTensor.*", category=FutureWarning)
        yield
