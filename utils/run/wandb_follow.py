"""Send the log of a run to Weights & Biases, while it grows or afterwards.

    python -m utils.run.wandb_follow results/CIFAR10/ConvNetD3/ipc1/my_run [--mode offline]

metrics.jsonl is read line by line and each line becomes a record of a new wandb run, whose
configuration is config.yaml. `--wandb online` of distill_att.py starts this file as a process
beside the run. So what wandb does (prompts, exit hooks that wait for the network, a service that
outlives it and keeps its output open) never reaches the run, and what hangs can be killed. Nothing
of this repository is imported here, for that process does not need torch.

Each call of a run is a wandb run with the whole log so far, so the latest one is complete. They
cannot be one: of several offline runs with the same id, `wandb sync` keeps the last.
"""

import argparse
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

# A server may take its time to answer at the start, when nobody waits for it.
INIT_SECONDS = 60
# A call of wandb that takes longer hangs, and ends the process beside a run.
CALL_SECONDS = 120
# At the end wandb sends what is left for so long, and the run waits a little longer.
SEND_SECONDS = 5
WAIT_SECONDS = 8
# How long the process sleeps before it looks for new lines.
POLL_SECONDS = 1.0

UNSENT = "wandb could not send everything in time"
SETTINGS = {
    "init_timeout": INIT_SECONDS,
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class WandbFollower:
    """The process beside one call of a run. Nothing here raises, and only `finish` waits, at most
    about WAIT_SECONDS. What fails, at any time, is one line, and the log can be sent later.
    """

    @classmethod
    def start(cls, folder: Path, mode: str) -> "WandbFollower | None":
        """Follow the log in `folder`; None where `mode` is disabled or no process can start."""
        if mode == "disabled":
            return None
        try:
            return cls(folder, mode)
        except OSError as error:
            tqdm.write(f"going on without wandb: {error}; {_later(folder)}")
            return None

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder = folder
        self._is_over = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder.absolute()), f"--mode={mode}", "--beside"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )

    def look(self) -> None:
        """Print, once, how the process has ended where it has."""
        if self._is_over or self._process.poll() is None:
            return
        assert self._process.stdout is not None
        said = self._process.stdout.read().decode().strip()
        if not said and self._process.returncode:
            said = f"going on without wandb: its process has ended; {_later(self._folder)}"
        self._end(said)

    def finish(self, status: int = 0) -> None:
        """End the wandb run, as one that failed where `status` is not 0, and print what is left to
        do. A call that ends without this leaves a wandb run that failed.
        """
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # the process may have ended
            pipe.write(f"{status}\n".encode())
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(WAIT_SECONDS)
        self.look()
        if not self._is_over:
            _kill_tree(self._process.pid)
            with suppress(subprocess.TimeoutExpired):  # not even killed, as with a disk that hangs
                self._process.wait(1)
            self._end(f"{UNSENT}; {_later(self._folder)}")

    def _end(self, said: str) -> None:
        self._is_over = True
        if said:
            tqdm.write(said)


def _later(folder: Path) -> str:
    return f"to upload: python -m utils.run.wandb_follow {shlex.quote(str(folder))}"


def _kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


def new_lines(path: Path, is_over: Callable[[], bool]) -> Iterator[bytes]:
    """Each different line of `path` once, as they come, until `is_over()`, which may wait.

    A file that is renamed over `path`, as a rewind does, is read from its start. A line without
    its end is left for later.
    """
    seen: set[int] = set()
    file = None
    while True:
        is_last = is_over()  # first: what was written before the end is read
        if path.exists() and (
            file is None or not os.path.samestat(os.fstat(file.fileno()), path.stat())
        ):
            file = open(path, "rb")  # noqa: SIM115 (the one before is closed with its last reference)
        while file is not None and (line := file.readline()):
            if not line.endswith(b"\n"):
                file.seek(-len(line), os.SEEK_CUR)
                break
            if hash(line) not in seen:
                seen.add(hash(line))
                yield line
        if is_last:
            return


def send(
    folder: Path,
    mode: Any,
    *,
    is_over: Callable[[], bool] = lambda: True,
    status: Callable[[], int] = lambda: 0,
    limit: int = 0,
    **settings: Any,
) -> str:
    """Make a wandb run of the run in `folder`, with every line of its log until `is_over()`.

    A call of wandb that takes more than `limit` seconds ends the process (0: no limit). Returns
    what to say: where the wandb run is.
    """
    signal.alarm(limit)
    import wandb

    run = wandb.init(
        project="att",
        name=folder.name,
        group="/".join(folder.parts[-4:])[-128:],
        mode=mode,
        config=yaml.safe_load((folder / "config.yaml").read_text("utf-8")),
        dir=str(folder),  # where that cannot be written, the system's folder for temporary files
        settings={**SETTINGS, **settings},
    )
    run.define_metric("*", step_metric="iteration")
    for line in new_lines(folder / "metrics.jsonl", is_over):
        signal.alarm(limit)
        with suppress(ValueError, RecursionError):  # a line that a killed call has cut off
            if isinstance(record := json.loads(line), dict):
                run.log(record)
    run.finish(exit_code=status())
    if mode == "offline":
        files = shlex.quote(os.path.dirname(run.dir))
        return f"wandb logged offline; to upload: wandb sync {files}"
    return f"sent to wandb: {run.url}"


def send_beside_a_run(folder: Path, mode: str) -> None:
    """Send the log of the run that has started this process, until its exit status comes on stdin;
    print one line at most. Does not return.

    The end of stdin, or of that process, without a status is a failure.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # whoever ends the run, ends stdin
    # What wandb prints, and the service that it starts, must not get hold of the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    told, starter = b"", os.getppid()

    def is_over() -> bool:
        nonlocal told
        signal.alarm(0)
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        signal.alarm(CALL_SECONDS)
        told = os.read(0, 16) if ready else b""
        return bool(ready) or os.getppid() != starter

    try:
        said = send(
            folder,
            mode,
            is_over=is_over,
            status=lambda: int(told or 1),
            limit=CALL_SECONDS,
            finish_timeout=SEND_SECONDS,
            finish_timeout_raises=True,
        )
    except TimeoutError:
        said = f"{UNSENT}; {_later(folder)}"
    except BaseException as error:
        said = f"going on without wandb: {_one_line(error)}; {_later(folder)}"
    with suppress(OSError):  # the run may be gone
        print(said, file=answers, flush=True)
    os._exit(0)  # wandb's exit hooks wait for its service


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="wandb_follow.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.run_directory.absolute()
    if args.beside:
        send_beside_a_run(folder, args.mode)
    for name in ("metrics.jsonl", "config.yaml"):
        if not (folder / name).is_file():
            parser.error(f"{folder} is no run directory: it has no {name}")
    try:
        print(send(folder, args.mode))
    except Exception as error:
        parser.error(_one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
