"""SIGTERM to this process: at once, after a step, and as it was before and after."""

import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from train.preemption import Preemption, Stopped


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), Preemption():
        ask()
        pytest.fail("still running")
    assert signal.getsignal(signal.SIGTERM) == before


def test_among_steps_it_waits_to_be_asked_for():
    with pytest.raises(Stopped, match="after the last step"), Preemption() as preemption:
        with preemption.deferred():
            assert not preemption.reached()
            ask()
            assert preemption.reached()
        pytest.fail("still running")


def test_what_is_at_once_among_steps_is_broken_off():
    with Preemption() as preemption, pytest.raises(Stopped, match="after the last step"), preemption.deferred():
        with pytest.raises(Stopped), preemption.at_once():
            ask()
            pytest.fail("still running")
        with pytest.raises(Stopped), preemption.at_once():
            pytest.fail("though it was asked before")
        assert preemption.reached()


def test_processes_stop_at_the_same_place(monkeypatch):
    """Each place where they ask has the next number, steps and looks alike; where one said to stop, all do."""
    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 4)
    with pytest.raises(Stopped, match="after the last step"), Preemption() as preemption, preemption.deferred():
        preemption.look()
        assert not preemption.reached()
        with pytest.raises(Stopped), preemption.at_once():
            preemption.look()
            preemption.look()
        assert asked == [1, 2, 3, 4] and preemption.reached() and asked == [1, 2, 3, 4]


def test_a_process_alone_does_not_look():
    with pytest.raises(Stopped), Preemption() as preemption, preemption.deferred():
        ask()
        preemption.look()


def test_an_error_among_the_steps_is_the_one_that_is_seen():
    with pytest.raises(ZeroDivisionError), Preemption() as preemption, preemption.deferred():
        ask()
        raise ZeroDivisionError


def test_another_thread_leaves_the_signal_alone():
    """Python refuses a handler there."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption, preemption.deferred():
            seen.append((signal.getsignal(signal.SIGTERM), preemption.reached()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
