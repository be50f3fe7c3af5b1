"""Signals: raised, deferred, and what the exit status and the command line say."""

import signal
import sys

import pytest

from utils import interruption
from utils.interruption import Interrupted, deferred


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that no signal has come to; the handlers of the test run come back."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    monkeypatch.setattr(interruption, "_first", None)
    monkeypatch.setattr(interruption, "_more_flags", [])
    interruption.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_a_signal_raises_where_the_script_stands(number, status):
    assert not interruption.asked()
    with pytest.raises(Interrupted):
        signal.raise_signal(number)
    assert interruption.asked()
    assert interruption.status() == status


def test_no_handler_of_failures_swallows_it():
    assert not issubclass(Interrupted, Exception)


def test_deferred_it_is_noted_and_raises_at_the_next_place_that_lets_it():
    with deferred():
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked_anyone()
        with pytest.raises(Interrupted), deferred(False):
            pytest.fail("not reached")
    with pytest.raises(Interrupted), deferred(False):
        pytest.fail("not reached")


def test_within_deferred_a_block_may_be_interrupted():
    with deferred(), pytest.raises(Interrupted), deferred(False):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("not reached")


def test_an_echo_is_no_second_signal_but_a_later_one_ends_the_process(monkeypatch):
    left = []
    monkeypatch.setattr(interruption.os, "_exit", left.append)
    with deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert left == []
        monkeypatch.setattr(interruption, "ECHO_SECONDS", -1.0)
        signal.raise_signal(signal.SIGTERM)
    assert left == [130]  # that of the first


def test_the_command_that_continues(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/code/distill_att.py", "--save_path", "my results"])
    assert interruption.command() == "python distill_att.py --save_path 'my results'"
    interruption.to_continue("--run_name", "x_2")
    assert interruption.command().endswith("--save_path 'my results' --run_name x_2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert interruption.command().startswith("torchrun ... distill_att.py --save_path")
