"""What a rank says that cannot meet the others."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from sharded_spd.finetune.world import RankLost, free_port, name_lost_ranks


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RankLost, match=f"port {port} is in use.*set MASTER_PORT"), name_lost_ranks():
            TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=5))


def test_a_free_port_can_be_taken() -> None:
    port = int(free_port())
    assert TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=5)).port == port
