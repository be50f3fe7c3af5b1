"""Signals: raised, deferred, and what the exit status and the command line say."""

import signal
import sys

import pytest

from utils.core import stopping
from utils.core.stopping import Interrupted, abandonable, deferred, immediate


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that no signal has come to; the handlers of the test run come back."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(stopping, "_first", None)
    monkeypatch.setattr(stopping, "_more_flags", [])
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_a_signal_raises_where_the_script_stands(number, status):
    assert not stopping.received()
    with pytest.raises(Interrupted):
        signal.raise_signal(number)
    assert stopping.received()
    assert stopping.status() == status


def test_no_handler_of_failures_swallows_it():
    assert not issubclass(Interrupted, Exception)


def test_deferred_it_is_noted_and_raises_at_the_next_place_that_lets_it():
    with deferred():
        signal.raise_signal(signal.SIGTERM)
        assert stopping.received_anywhere()
        with pytest.raises(Interrupted), immediate():
            pytest.fail("not reached")
    with pytest.raises(Interrupted), immediate():
        pytest.fail("not reached")


def test_within_deferred_a_block_may_be_interrupted():
    with deferred(), pytest.raises(Interrupted), immediate():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("not reached")


def test_what_is_to_be_kept_is_kept_before_the_block_is_left():
    kept = []
    with deferred():
        with pytest.raises(Interrupted), immediate(keep=lambda: kept.append(1)):
            signal.raise_signal(signal.SIGTERM)
        assert kept == [1]
        with abandonable(keep=lambda: kept.append(2)):  # it may be given up, but ends by itself
            assert stopping.received()
        assert kept == [1]


def test_an_interruption_that_is_lost_says_nothing(capsys):
    class Dies:
        def __del__(self):
            raise error

    error = Interrupted()
    Dies()
    assert capsys.readouterr().err == ""


def test_an_echo_is_no_second_signal_but_a_later_one_ends_the_process(monkeypatch):
    left = []
    monkeypatch.setattr(stopping.os, "_exit", left.append)
    with deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert left == []
        monkeypatch.setattr(stopping, "ECHO_SECONDS", -1.0)
        signal.raise_signal(signal.SIGTERM)
    assert left == [130]  # that of the first


def test_the_command_that_continues(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/code/distill_att.py", "--save_path", "my results"])
    assert stopping.command() == "python distill_att.py --save_path 'my results'"
    stopping.continue_with("--run_name", "x_2")
    assert stopping.command().endswith("--save_path 'my results' --run_name x_2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert stopping.command().startswith("torchrun ... distill_att.py --save_path")
