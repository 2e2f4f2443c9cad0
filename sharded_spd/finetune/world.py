"""The ranks of a job: identity, sums, and stopping all of them at the same step."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from sharded_spd.errors import ConfigError
from sharded_spd.sharding.collectives import agree

T = TypeVar("T")

RENDEZVOUS = "SHARDED_SPD_RENDEZVOUS"
"""Environment variable: the file through which ranks that the command itself started find each other."""

Device = Literal["auto", "cpu", "cuda"]


class Interrupted(Exception):
    """All ranks agreed to stop: somebody sent SIGINT or SIGTERM to at least one of them."""


class RankLost(RuntimeError):
    """Another rank is gone or does not answer, so this one cannot continue."""


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""gloo's messages in that case; its errors have no class of their own."""


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Turn torch's transport failures into one sentence.

    Raises:
        RankLost: in place of such a failure inside the block.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT", "")
            raise RankLost(
                f"port {port} is in use, probably by another job on this machine; wanted a free one for this "
                "job's ranks to meet at: set MASTER_PORT"
            ) from error
        if not isinstance(error, dist.DistError) and not any(text in str(error) for text in _LOST):
            raise
        rank = os.environ.get("RANK", "0")
        raise RankLost(
            f"rank {rank} cannot continue: another rank has ended or does not answer; the last complete "
            "checkpoint is intact: the same command with --resume auto resumes from it"
        ) from error


def free_port() -> str:
    """A TCP port that nobody uses now, for a process that other ranks need not find."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@dataclass(frozen=True)
class World:
    """This rank's place among the ranks of the job."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all ranks (modified in place), collective."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action`, which calls no collective; if it raises on one rank, raise on all. Collective."""
        everyone = dist.group.WORLD if self.size > 1 else None
        return agree(action, [] if everyone is None else [everyone])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of the ranks, collective."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """The main rank's `value`, on every rank, collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def started_as_rank() -> bool:
    """Whether a launcher (torchrun, or this command) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


_JOINED: list[int] = []


def has_joined() -> bool:
    """Whether this process has been one of several ranks."""
    return bool(_JOINED)


def pick_device(device: Device, *, local_rank: int) -> torch.device:
    """The device of a rank; "auto" takes a GPU where there is one.

    Raises:
        ConfigError: there is none, or none for this rank.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here: set device to cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} there): "
            "start fewer ranks or set device to cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def join_world(device: Device) -> Iterator[World]:
    """Join the process group that the environment describes, or be a world of one; leave it at the end."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if not started_as_rank():
        yield World(rank=0, size=1, device=place)
        return
    _JOINED.append(rank)
    rendezvous = os.environ.get(RENDEZVOUS)
    dist.init_process_group(
        backend="nccl" if place.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}" if rendezvous else "env://",
        rank=rank,
        world_size=size,
    )
    try:
        yield World(rank=rank, size=size, device=place)
    finally:
        dist.destroy_process_group()


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the ranks compare at a step; a second signal exits."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle both signals inside the block; restore the previous handlers after it."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def flag(self) -> float:
        """1 if this rank was asked to stop, for a sum over the ranks."""
        return float(self.signal is not None)

    @property
    def exit_code(self) -> int:
        """The exit code of a process ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def check(self, world: World) -> None:
        """Stop on every rank if any rank was asked to, collective.

        Raises:
            Interrupted: on all ranks alike.
        """
        if world.sum_(torch.tensor([self.flag], device=world.device)).item() > 0:
            raise Interrupted
