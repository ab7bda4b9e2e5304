"""Signals: one wish may come twice at once; a later one ends the run."""

from __future__ import annotations

import os
import signal

import pytest

from elastic_moe.actors.stop import TWICE_S, Stop, signals


def test_a_signal_that_comes_twice_at_once_is_one_wish() -> None:
    stop = Stop()
    stop.take(signal.SIGTERM, 100.0)
    stop.take(signal.SIGTERM, 100.0 + TWICE_S / 2)
    assert (stop.count, stop.signum) == (1, signal.SIGTERM)


def test_a_later_signal_ends_the_run_at_once() -> None:
    stop = Stop()
    stop.take(signal.SIGTERM, 100.0)
    with pytest.raises(KeyboardInterrupt):
        stop.take(signal.SIGINT, 100.0 + TWICE_S)
    assert (stop.count, stop.signum) == (2, signal.SIGINT)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_are_taken_and_given_back(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with signals() as stop:
        os.kill(os.getpid(), signum)
        assert (stop.count, stop.signum) == (1, signum)
    assert signal.getsignal(signum) is before
