"""The pulse: ranks wait for a leader as long as it is alive, and name those that are not."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from experiments.clip import pulse as pulse_module
from experiments.clip.errors import UserError
from experiments.clip.pulse import Pulse


@pytest.fixture
def start(monkeypatch):
    """Pulses of ranks 0 to ``count`` - 1, all in this process, a heartbeat every 20 ms."""
    monkeypatch.setattr(pulse_module, "_SECONDS", 0.02)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    pulses = []

    def start(count, patience):
        pulses.extend(Pulse(rank, count, patience) for rank in range(count))
        return pulses

    yield start
    for pulse in pulses:
        pulse.stop()


@pytest.mark.slow
def test_ranks_wait_for_the_leader_longer_than_their_patience(start):
    leader, other = start(2, 0.3)
    left = []

    def lead():
        with leader.announcing():
            time.sleep(0.6)
            left.append("done")

    thread = threading.Thread(target=lead)
    thread.start()
    other.wait_for_leader()
    assert left == ["done"]
    thread.join()


def test_a_leader_that_fails_stops_the_others(start):
    leader, other = start(2, 5.0)
    with pytest.raises(ZeroDivisionError), leader.announcing():
        raise ZeroDivisionError
    with pytest.raises(UserError, match="stopped because rank 0 did: see its message"):
        other.wait_for_leader()
    with leader.announcing():
        pass
    other.wait_for_leader()


def test_a_leader_without_a_pulse_is_lost(start):
    leader, other = start(2, 0.2)
    leader.stop()
    with pytest.raises(UserError, match=r"rank 1 lost rank 0, which has had no pulse for 0.2 seconds"):
        other.wait_for_leader()


def test_silent_ranks_are_named(start):
    pulses = start(3, 0.2)
    pulses[2].stop()
    assert pulses[1].lost() == "rank 2"
    assert pulses[0].lost() == "rank 2"
