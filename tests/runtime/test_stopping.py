"""Signals that ask for a stop."""

import os
import signal
import threading

import pytest

from logitcache.runtime.stopping import StopFlag, ignore_signals, stop_flag

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def _send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_decides_the_exit_code(signum: int, code: int) -> None:
    with stop_flag() as stop:
        assert not stop
        _send(signum)
        assert stop
    error = stop.stopped("later")
    assert (str(error), error.exit_code) == ("later", code)


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_interrupts_at_once(first: int) -> None:
    with stop_flag():
        _send(first)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)


def test_a_scheduler_may_repeat_itself() -> None:
    with stop_flag() as stop:
        _send(signal.SIGTERM)
        _send(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


@pytest.mark.parametrize("signum", SIGNALS)
def test_handlers_are_put_back_whatever_happens(signum: int) -> None:
    before = signal.getsignal(signum)
    with stop_flag():
        assert signal.getsignal(signum) != before
    assert signal.getsignal(signum) == before
    with pytest.raises(ZeroDivisionError), stop_flag():
        _ = 1 / 0
    assert signal.getsignal(signum) == before


def test_another_thread_gets_a_flag_that_nothing_sets() -> None:
    before, flags = [signal.getsignal(signum) for signum in SIGNALS], []

    def work() -> None:
        with stop_flag() as stop:
            flags.append((stop, bool(stop), [signal.getsignal(signum) for signum in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [(flag, stopped, during)] = flags
    assert isinstance(flag, StopFlag)
    assert not stopped
    assert during == before


def test_workers_leave_signals_to_their_parent() -> None:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        ignore_signals()
        for signum in SIGNALS:
            _send(signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
