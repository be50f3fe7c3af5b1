"""Stop gracefully on a signal (SIGINT, SIGTERM, SIGUSR1): save, then print the command that
continues.

A signal raises Interrupted where the script stands. Within `deferred` it is only recorded, for the
script to look at. Where the script does neither in GRACE_SECONDS, because a compiler or a long step
keeps it or because it waits for other processes, a thread beside it keeps what the block that the
script is in names, and ends the process. A second signal ends it at once; files are whole or absent
at any time.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import NoReturn

import psutil

from utils.core import early, ranks
from utils.core.early import SIGNALS, script
from utils.core.errors import UserError
from utils.core.progress import close_bars

# A launcher passes on what the terminal has sent to everyone: that is no second signal.
ECHO_SECONDS = 1.0
# Batch systems kill after 30 seconds, some after 10.
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.05


class Interrupted(BaseException):
    """Not an Exception, so that nothing on the way takes it for a failure of its own."""


def _nothing() -> None:
    """What is kept where all is kept already."""


@dataclass(frozen=True)
class _Phase:
    """What a signal does: raise Interrupted, or only be recorded; and whether the process may be
    ended by the thread beside it, once that has called `keep`.
    """

    raises: bool = True
    may_end: bool = True
    keep: Callable[[], object] = _nothing


_first: tuple[int, float] | None = None  # the first signal and when it came
_phase = _Phase()
_changing = threading.Lock()  # of the phase; held to the end by whoever ends the process
_more_flags: list[str] = []


def listen() -> None:
    """Handle the signals here from now on."""
    sys.unraisablehook = partial(_ignore_lost, sys.unraisablehook)
    for number in SIGNALS:
        signal.signal(number, _receive)


def _ignore_lost(
    others: Callable[["sys.UnraisableHookArgs"], object], lost: "sys.UnraisableHookArgs"
) -> None:
    """Say nothing of an Interrupted that Python could not pass on; the thread beside answers it."""
    if not isinstance(lost.exc_value, Interrupted):
        others(lost)


def watch() -> None:
    """Start the thread that ends the process where a signal is not answered in time.

    It hears of signals at once, also while Python runs nothing in the main thread.
    """
    reader, writer = socket.socketpair()  # not a pipe, which Windows cannot wait for
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _receive(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is None:
        _first = number, time.monotonic()
        if _phase.raises:
            raise Interrupted
    elif _is_second(_first[1]):
        os._exit(status())


def _is_second(first: float) -> bool:
    """Whether a signal is one more than that which came at `first`.

    torchrun sends one more to everyone once a process has left, and means to wait for the others.
    """
    return time.monotonic() - first > ECHO_SECONDS and not ranks.under_torchrun()


def _watch(signals: socket.socket) -> None:
    while (number := signals.recv(1)[0]) not in SIGNALS:
        pass
    came, wait = time.monotonic(), GRACE_SECONDS
    while True:
        ready, _, _ = select.select([signals], [], [], wait)
        if ready and signals.recv(1)[0] in SIGNALS and _is_second(came):
            os._exit(status())
        wait = max(POLL_SECONDS, came + GRACE_SECONDS - time.monotonic())
        if wait == POLL_SECONDS:
            with _changing:  # nobody goes on to another phase meanwhile
                if _phase.may_end:
                    _abandon(number, came)


def _abandon(number: int, came: float) -> NoReturn:
    """Keep what the phase names and end the process, whatever the main thread is at."""
    global _first
    _first = _first or (number, came)
    result, message = status(), farewell()
    try:
        _phase.keep()
    except Exception as error:
        result = 2 if isinstance(error, UserError) else 1
        message = f"{script()}: error: {' '.join(str(error).splitlines())}"
    close_bars()
    end(result, message if ranks.is_main() else "")


def end(status: int, message: str = "") -> NoReturn:
    """Print `message` and end the process with the compilers that it has started.

    Nothing is waited for: neither other threads nor what is registered for the end, where torch
    waits minutes for its compilers. What leads a session of its own, where systems have sessions,
    looks after itself.
    """
    if message:
        print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):
                if not hasattr(os, "getsid") or os.getsid(child.pid) == os.getsid(0):
                    child.kill()
    os._exit(status)


def received() -> bool:
    """Whether a signal has come."""
    return _first is not None


def status() -> int:
    """The exit status after a signal: 130 for Ctrl-C, else 143."""
    return early.status_of(_first[0] if _first else signal.SIGTERM)


def farewell() -> str:
    """The last line after a signal."""
    return early.farewell(*_more_flags)


@contextmanager
def deferred() -> Iterator[None]:
    """Only record signals within the block, and come to its end or to a block within it first."""
    with _in_phase(_Phase(raises=False, may_end=False)):
        yield


@contextmanager
def abandonable(keep: Callable[[], object] = _nothing) -> Iterator[None]:
    """Only record signals within the block, but give it up where it takes too long: the process
    then ends when `keep` is done, in another thread. The block must not change what `keep` writes.
    """
    with _in_phase(_Phase(raises=False, keep=keep)):
        yield


@contextmanager
def immediate(keep: Callable[[], object] = _nothing) -> Iterator[None]:
    """Raise Interrupted within the block at once, also for a signal that came before it, when
    `keep` is done. The block must not change what `keep` writes.
    """
    try:
        with _in_phase(_Phase(keep=keep)):
            if received():
                raise Interrupted
            yield
    except Interrupted:
        with deferred():
            keep()
        raise


def answered() -> None:
    """Say that the main thread ends the process itself from here on."""
    _enter(_Phase(raises=False, may_end=False))


@contextmanager
def _in_phase(phase: _Phase) -> Iterator[None]:
    before = _phase
    _enter(phase)
    try:
        yield
    finally:
        _enter(before)


def _enter(phase: _Phase) -> None:
    global _phase
    with _changing:
        _phase = phase


def received_anywhere() -> bool:
    """Whether a signal has come to any of the processes; all of them must call."""
    return ranks.true_on_any_rank(received())


def continue_with(*flags: str) -> None:
    """Add `flags` to the command that continues this call."""
    _more_flags[:] = flags


def command() -> str:
    """The command line that continues this call."""
    return early.command(*_more_flags)
