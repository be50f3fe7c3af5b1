"""Stop gracefully on a signal (SIGINT, SIGTERM, SIGUSR1): save, then print the command that
continues.

A signal raises Interrupted where the script stands. Within `deferred` it is only recorded, for the
script to look at. A second one ends the process at once; files are whole or absent at any time.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.core import ranks

# From a terminal; a batch system or torchrun; Slurm, where --signal=USR1 announces the end; Ctrl-
# Break, and what ends a process group, on Windows. Each system has some of them.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# A launcher passes on what the terminal has sent to everyone: that is no second signal.
ECHO_SECONDS = 1.0


class Interrupted(BaseException):
    """Not an Exception, so that nothing on the way takes it for a failure of its own."""


_first: tuple[int, float] | None = None  # the first signal and when it came
_is_deferred = False
_more_flags: list[str] = []


def listen() -> None:
    """Handle the signals here from now on."""
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


def received() -> bool:
    """Whether a signal has come."""
    return _first is not None


def status() -> int:
    """The exit status after a signal: 130 for Ctrl-C, else 143."""
    return 130 if _first and _first[0] == signal.SIGINT else 143


@contextmanager
def deferred() -> Iterator[None]:
    """Only record signals within the block."""
    with _set_deferred(True):
        yield


@contextmanager
def immediate() -> Iterator[None]:
    """Raise Interrupted within the block at once, also for a signal that came before it."""
    with _set_deferred(False):
        if received():
            raise Interrupted
        yield


@contextmanager
def _set_deferred(is_deferred: bool) -> Iterator[None]:
    global _is_deferred
    before, _is_deferred = _is_deferred, is_deferred
    try:
        yield
    finally:
        _is_deferred = before


def received_anywhere() -> bool:
    """Whether a signal has come to any of the processes; all of them must call."""
    return ranks.true_on_any_rank(received())


def continue_with(*flags: str) -> None:
    """Add `flags` to the command that continues this call."""
    _more_flags[:] = flags


def command() -> str:
    """The command line that continues this call."""
    launcher = "torchrun ..." if ranks.under_torchrun() else "python"
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:], *_more_flags]
    quoted = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    return f"{launcher} {quoted}"
