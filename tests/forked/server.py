"""The server that forks: python tests/forked/server.py SOCKET, until its stdin is closed."""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

import sklearn.datasets  # imported for those who are forked, as all below
import sklearn.model_selection  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.run
import torchvision.utils  # noqa: F401

import buffer  # noqa: F401
import distill_att  # noqa: F401
import eval  # noqa: F401
import scripts.plan.__main__
import scripts.report.__main__  # noqa: F401


def serve(address: str) -> None:
    """Answer each connection by a process of its own; end with stdin."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # from here on it answers
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                attend(connection)
            connection.close()


def attend(connection: socket.socket) -> None:
    """Begin what is asked for, pass signals on to it, send its status and end. It is killed when
    whoever asked is.
    """
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    left, message = int.from_bytes(head, "big"), b""
    while len(message) < left:
        message += connection.recv(left - len(message))
    order = json.loads(message)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.close()
        os._exit(become(order["arguments"], order["folder"], order["environment"], streams))
    for stream in streams:
        os.close(stream)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            _, status = os.waitpid(child, 0)
            with contextlib.suppress(OSError):
                connection.sendall(
                    os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True)
                )
            os._exit(0)
        for number in connection.recv(16) or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def become(
    arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]
) -> int:
    """Run as a fresh Python would; the exit status."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    try:
        if arguments[0] == "-m":
            sys.path[0] = folder
            for imported in (arguments[1], f"{arguments[1]}.__main__"):
                sys.modules.pop(imported, None)
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
