"""Requests to stop: signals, Ctrl-C, the end of the job's time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lorafair import console
from lorafair.cluster import signals
from lorafair.cluster.signals import (
    ANOTHER_RANK,
    NO_REASON,
    TIME_LIMIT,
    SignalNumbers,
    finishing_clients,
    handle_only,
    handling_signals,
    request_stop,
    request_stop_before_time_limit,
    set_time_limit,
    stop_requested,
)
from lorafair.errors import LorafairError


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    yield
    signals.reset()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_only_set_a_flag_and_ctrl_c_stops_at_once_the_second_time() -> None:
    with handling_signals():
        assert stop_requested() == NO_REASON
        send(signal.SIGUSR1)
        assert stop_requested() == signal.SIGUSR1
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop_requested() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stop_requested() == NO_REASON
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_are_taken_where_the_process_has_inherited_them_blocked() -> None:
    """A fork server that was started while data workers were starting has them blocked, and all its children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with handling_signals():
            send(signal.SIGUSR1)
            assert stop_requested() == signal.SIGUSR1
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signals_that_are_not_listened_to_have_their_usual_effect() -> None:
    with handling_signals():
        handle_only(["USR2"])
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        send(signal.SIGUSR2)
        assert stop_requested() == signal.SIGUSR2


def test_a_forked_process_does_not_act_on_a_signal() -> None:
    with handling_signals():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(stop_requested())
        assert os.waitpid(child, 0)[1] == 0


def test_signals_of_a_forked_process_are_not_counted_as_those_of_this_one() -> None:
    """Ctrl-C goes to all processes of a terminal, and the second one ends a run at once."""
    numbers = SignalNumbers()
    try:
        with handling_signals():
            child = os.fork()
            if child == 0:
                send(signal.SIGUSR1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert signal.SIGUSR1 not in numbers.read()  # SIGCHLD may be, where torch's DataLoader listens to it
            send(signal.SIGUSR1)
            assert signal.SIGUSR1 in numbers.read()
    finally:
        numbers.close()


def test_what_would_not_end_before_the_jobs_limit_asks_to_stop() -> None:
    request_stop_before_time_limit(1e6)
    assert stop_requested() == NO_REASON  # no known limit
    set_time_limit(100)
    request_stop_before_time_limit(50)
    assert stop_requested() == NO_REASON
    request_stop_before_time_limit(85)
    assert stop_requested() == TIME_LIMIT


def test_the_weightiest_reason_counts() -> None:
    for reason in (ANOTHER_RANK, signal.SIGUSR1, TIME_LIMIT, signal.SIGTERM):
        request_stop(reason)
    assert stop_requested() == TIME_LIMIT


def test_a_library_that_makes_an_error_of_its_own_of_ctrl_c_does_not_hide_it() -> None:
    def listen(times: int) -> None:
        with handling_signals():
            try:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            finally:
                raise RecursionError("an import that was cut short")

    with pytest.raises(KeyboardInterrupt):
        listen(2)
    with pytest.raises(RecursionError):
        listen(1)


def test_ctrl_c_ends_a_start_at_once_and_lets_clients_finish_afterwards() -> None:
    with handling_signals(starting=True):
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)  # while the process ends
        signals.reset()
        with finishing_clients():
            send(signal.SIGINT)
            assert stop_requested() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            signals.reset()
        with pytest.raises(KeyboardInterrupt):  # the start of the next run of a comparison
            send(signal.SIGINT)
    with handling_signals():
        send(signal.SIGINT)
        assert stop_requested() == signal.SIGINT


@pytest.mark.parametrize("failure", [LorafairError("the disk is full"), SystemExit(2)])
def test_ctrl_c_ends_the_start_that_follows_a_failed_run_at_once(failure: BaseException) -> None:
    """A comparison goes on with its next run."""
    with handling_signals(starting=True):
        with pytest.raises(type(failure)), finishing_clients():
            raise failure
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        signals.reset()
        with suppress(type(failure)), finishing_clients():
            send(signal.SIGINT)
            raise failure
        assert not signals.ctrl_c_ends_at_once(), "the stop that was asked for is under way"


def test_a_first_ctrl_c_is_heard_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb") as full, handling_signals():
        monkeypatch.setattr(signals, "stderr_number", full.fileno)
        send(signal.SIGINT)
        assert stop_requested() == signal.SIGINT


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_tells_of_a_ctrl_c_that_all_get(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    console.set_rank(rank)
    try:
        with handling_signals():
            send(signal.SIGINT)
            assert stop_requested() == signal.SIGINT
    finally:
        console.set_rank(0)
    assert capfd.readouterr().err.count("stopping once the clients in training are done") == (rank == 0)


def test_what_a_stop_has_still_to_do_is_not_interrupted_by_a_first_ctrl_c() -> None:
    with handling_signals(starting=True):
        with pytest.raises(RuntimeError), finishing_clients():
            raise RuntimeError
        send(signal.SIGINT)
        assert stop_requested() == signal.SIGINT
