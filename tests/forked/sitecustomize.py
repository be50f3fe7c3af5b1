"""Let a fork of a server that has imported everything do the work of a Python that is starting.

Python imports this file where it starts with this folder in PYTHONPATH. If the command is one of
the project's and FORK_SERVER names a socket, it is sent there with the standard streams; this
process passes on signals and ends as the fork does. Tests start scripts a hundred times, and
importing torch takes seconds each time.
"""

import os
import sys

SCRIPTS = (
    "buffer.py",
    "distill_att.py",
    "eval.py",
    "run_in_ranks.py",
    "failing_eval.py",
    "as_windows.py",
    "stuck.py",
)
MODULES = ("scripts.", "torch.distributed.run")


def is_ours(arguments):
    """Whether a Python with these arguments runs a script or module of the project."""
    if arguments[:1] == ["-m"]:
        return len(arguments) > 1 and arguments[1].startswith(MODULES)
    return bool(arguments) and os.path.basename(arguments[0]) in SCRIPTS


def hand_over(address, arguments):
    """Run `arguments` in a fork of the server at `address`; end with its status."""
    import json
    import signal
    import socket
    import time

    while not os.path.exists(address):
        time.sleep(0.05)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        for number in signals:
            signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
        message = json.dumps(order).encode()
        socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(message)
        status = int.from_bytes(server.recv(4), "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


ARGUMENTS = [argument for argument in sys.orig_argv[1:] if argument != "-u"]  # torchrun's
if "FORK_SERVER" in os.environ and is_ours(ARGUMENTS):
    hand_over(os.environ["FORK_SERVER"], ARGUMENTS)
