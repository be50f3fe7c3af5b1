"""Turn a script's main(argv) into an exit status, and its parser's complaints into one line."""

import argparse
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch

from utils.core import ranks, stopping
from utils.core.errors import UserError

SECONDS_FOR_MAIN = 5
FEW_FLAGS = 15  # that an error message can list
# What torch says of the machine or of itself, where nobody can do anything about it: the beginnings
# of lines by the logger that prints them, and of warnings.
IDLE_LOGS = {"torch.utils.cpp_extension": "No CUDA runtime is found"}
IDLE_WARNINGS = ("`torch.jit.script` is deprecated",)  # torch.func calls it


def run_script(main: Callable[[Sequence[str]], int]) -> int:
    """Call `main` with the command line and return its exit status.

    A UserError becomes one line on stderr and status 2, memory that runs out one line and status 1,
    a signal one line with the command that continues and status 130 or 143. Of several processes
    with the same error the first one prints it: torchrun ends the others while they wait. A process
    that fails leaves at once, without waiting for the others.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows lines as they come; a name that is no text in its encoding is escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    script = stopping.script()
    _silence_idle_warnings()
    stopping.listen()
    stopping.watch()
    try:
        return main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_MAIN)
        status, message = 2, f"{script}: error: {' '.join(str(error).splitlines())}"
    except (Exception, stopping.Interrupted) as error:
        if stopping.received():  # whatever failed then was cut off
            stopping.answered()
            stopping.end(stopping.status(), stopping.farewell() if ranks.is_main() else "")
        if _is_out_of_memory(error):
            status = 1
            message = (
                f"{script}: out of memory: lower --micro_batch, --experts_at_once or "
                "--eval_at_once, or leave out --load_all"
            )
        elif ranks.under_torchrun():
            status, message = 1, traceback.format_exc()
        else:
            raise
    if ranks.is_main() or not stopping.received():
        print(message, file=sys.stderr, flush=True)
    if ranks.under_torchrun():
        os._exit(status)
    return status


def _silence_idle_warnings() -> None:
    for logger, beginning in IDLE_LOGS.items():
        logging.getLogger(logger).addFilter(partial(_says_more_than, beginning))
    for beginning in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


def _says_more_than(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory or the host's ran out; torch has a type for CUDA's alone."""
    text = str(error)
    host = isinstance(error, MemoryError) or "can't allocate memory" in text
    return host or "MPS backend out of memory" in text or isinstance(error, torch.OutOfMemoryError)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first --, and what stands behind it, which is for another script."""
    at = [*argv, "--"].index("--")
    return [*argv[:at]], [*argv[at + 1 :]]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors, one line each."""

    @classmethod
    def of(cls, prog: str, text: str | None) -> "Parser":
        """A parser that explains itself by `text` as it stands, and takes no abbreviations."""
        return cls(
            prog=prog,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        flags = [action.option_strings[-1] for action in shown if action.option_strings]
        names_them = "unrecognized" in message and len(flags) <= FEW_FLAGS
        raise UserError(
            f"{message}; flags: {', '.join(flags)}" if names_them else f"{message} (see --help)"
        )
