"""Signals that ask a script to end: what was computed is kept, then it leaves.

A signal raises Interrupted where the script stands, or, within `deferred`, is noted only. A second
one ends the process at once; files are whole or absent whenever that is.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.core import ranks

# From a terminal; a batch system or torchrun; Slurm, where --signal=USR1 announces the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on what the terminal has sent to everyone: that is no second signal.
ECHO_SECONDS = 1.0


class Interrupted(BaseException):
    """Not an Exception, so that nothing on the way takes it for a failure of its own."""


_first: tuple[int, float] | None = None  # the first signal and when it came
_is_deferred = False
_more_flags: list[str] = []


def listen() -> None:
    """From now on the signals are handled here."""
    for number in SIGNALS:
        signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is None:
        _first = number, time.monotonic()
        if not _is_deferred:
            raise Interrupted
    # torchrun sends one more to everyone once a process has left, and means to wait for the others.
    elif time.monotonic() - _first[1] > ECHO_SECONDS and not ranks.under_torchrun():
        os._exit(status())


def asked() -> bool:
    """Whether a signal has come."""
    return _first is not None


def status() -> int:
    """The exit status of a process that was asked to end: 130 after Ctrl-C, else 143."""
    return 130 if _first and _first[0] == signal.SIGINT else 143


@contextmanager
def deferred(on: bool = True) -> Iterator[None]:
    """Within the block signals are noted only; with `on` false, they raise again."""
    global _is_deferred
    before, _is_deferred = _is_deferred, on
    try:
        if not on and asked():
            raise Interrupted
        yield
    finally:
        _is_deferred = before


def asked_anyone() -> bool:
    """Whether a signal has come to any of the processes; all of them must call."""
    return ranks.any_of(asked())


def to_continue(*flags: str) -> None:
    """Whoever continues this call has to add `flags` to it."""
    _more_flags[:] = flags


def command() -> str:
    """The command line that continues this call."""
    launcher = "torchrun ..." if ranks.under_torchrun() else "python"
    return f"{launcher} {shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:], *_more_flags])}"
