"""Start scripts without importing torch each time: as forks of a server that has imported all.

They are processes of their own, with their own folder, environment and streams; what a script says
and leaves behind is the same. Tests that kill, or that look at the start itself, take real ones.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FORKED = Path(__file__).parent / "forked"


def environment(**more):
    """The variables by which a Python of the project is such a fork, and its children are."""
    return {**os.environ, "PYTHONPATH": str(FORKED), "FORK_SERVER": _server(), **more}


@cache
def _server():
    """The socket of the server, which ends with this process."""
    folder, owner = tempfile.mkdtemp(prefix="forked-"), os.getpid()
    address = str(Path(folder) / "socket")
    server = subprocess.Popen(
        [sys.executable, str(FORKED / "server.py"), address],
        env={**os.environ, "PYTHONPATH": str(FORKED.parents[1])},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def end():
        if os.getpid() == owner:  # forks of this process come by here too when they end
            server.stdin.close()
            server.wait()
            shutil.rmtree(folder)

    atexit.register(end)
    return address
