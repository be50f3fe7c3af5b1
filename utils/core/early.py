"""Answer a signal while a script is still being imported, which takes seconds.

A script imports this before anything else. Nothing has been done by then, so that nothing is kept;
`stopping` takes the signals over. What only imports a script is left alone.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

# From a terminal; a batch system or torchrun; Slurm, where --signal=USR1 announces the end; Ctrl-
# Break, and what ends a process group, on Windows. Each system has some of them.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ROOT = Path(__file__).parents[2]
FOLDER = "scripts/folder/__main__.py"
SCOREBOARD, DOWNSTREAM = "scripts/scoreboard/__main__.py", "scripts/downstream/__main__.py"
SCRIPTS = ("buffer.py", "distill_att.py", "eval.py", FOLDER, SCOREBOARD, DOWNSTREAM)


def status_of(number: int) -> int:
    """The exit status after the signal `number`."""
    return 130 if number == signal.SIGINT else 143


def script() -> str:
    """The name of the script that runs; of a package, such as scripts.report, its own."""
    return _module() or os.path.basename(sys.argv[0])


def command(*more_flags: str) -> str:
    """The command line that continues this call, with `more_flags` of the script's own."""
    if _shell:
        return shlex.join(["bash", _shell, *sys.argv[1:]])
    launcher = "torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    words = [*(["-m"] if _module() else []), script(), *sys.argv[1:], *more_flags]
    quoted = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    return f"{launcher} {quoted}"


def _module() -> str:
    """The package that was started by python -m, if one was."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or os.path.basename(sys.argv[0]) != "__main__.py":
        return ""
    return str(spec.name).removesuffix(".__main__")


def farewell(*more_flags: str) -> str:
    """The last line after a signal."""
    return f"{script()}: interrupted; to continue: {command(*more_flags)}"


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{farewell()}\n".encode(errors="backslashreplace"))
    os._exit(status_of(number))


def _started() -> str:
    """Which of SCRIPTS this process was started with; empty where it was none."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return next((name for name in SCRIPTS if path and Path(path).resolve() == ROOT / name), "")


_shell = ""  # the shell script that is called instead of the script


def name_shell() -> None:
    """Speak of scripts/distil_folder.sh, as it was called, in place of the module behind it."""
    global _shell
    _shell = sys.argv[0] = os.environ.get("DISTIL_FOLDER_SH", "scripts/distil_folder.sh")


if _started():
    if _started() == FOLDER:
        name_shell()
    for _number in SIGNALS:
        signal.signal(_number, _end)
