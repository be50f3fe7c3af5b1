"""Run a script of the project as on Windows, as far as Linux can: python as_windows.py SCRIPT ...

The project is imported anew without the signals, functions and modules that Windows lacks; folders
cannot be opened there, and a file that is mapped cannot be replaced.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

KEPT = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
SIGNALS = [name for name in vars(signal) if name.startswith("SIG") and name not in KEPT]
FUNCTIONS = "fork forkpty killpg setsid getsid getpgid getuid sched_getaffinity mkfifo".split()
MODULES = "fcntl resource termios pty".split()
OURS = ("buffer", "distill_att", "eval", "networks", "scripts", "utils")


def become_windows():
    for name in [*SIGNALS, "alarm", "setitimer", "pause"]:
        vars(signal).pop(name, None)
    for name in FUNCTIONS:
        vars(os).pop(name, None)
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    sys.modules |= dict.fromkeys(MODULES)  # None: not to be imported
    open_file, replace = os.open, os.replace

    def open_no_folder(path, *arguments, **keywords):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, *arguments, **keywords)

    def replace_unmapped(source, target):
        if str(Path(target).resolve()) in Path("/proc/self/maps").read_text():
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    os.open, os.replace = open_no_folder, replace_unmapped
    from utils.core import files

    files.REPLACES_MAPPED = False  # follows from os.name, by which pathlib goes too


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[0] = str(root)
    import distill_att  # noqa: F401 (others' packages are imported as they are here)
    import eval  # noqa: F401

    sys.argv = sys.argv[1:]
    become_windows()
    runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
