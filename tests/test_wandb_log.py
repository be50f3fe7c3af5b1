"""Weights & Biases, without a network: a wandb of our own that fails as the real one may."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from utils.run import wandb_log
from utils.run.wandb_log import WandbLog

ROOT = Path(__file__).parent.parent

# Notes what it is called with. Where FAULT names what it does, that fails or hangs.
FAKE = """
import json, os, sys, time

print("no line of the run's")
print("nor this", file=sys.stderr)

def note(what, value=None):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([what, value]) + "\\n")
    fault = os.environ["FAULT"].split()
    if fault[:1] == [what]:
        if fault[1] == "hangs":
            time.sleep(60)
        if fault[1] == "dies":
            os.kill(os.getpid(), 9)
        raise {"times_out": TimeoutError}.get(fault[1], OSError)(28, "No space left on device")

class Run:
    dir = "/somewhere/run-1/files"
    def define_metric(self, *_, **__): pass
    def log(self, record): note("log", record)
    def finish(self, exit_code): note("finish", exit_code)

def init(**keywords):
    note("init", keywords)
    return Run()

note("import", sys.stdin.isatty())
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A function that sets the fault; it returns what wandb was called with, as a function."""
    notes = tmp_path / "notes"
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NOTES", str(notes))

    def prepare(fault=""):
        monkeypatch.setenv("FAULT", fault)
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()]

    return prepare


def start(tmp_path, mode="online"):
    config = {"lr": 0.1, "path": Path("x")}
    return WandbLog.start(name="x", mode=mode, config=config, folder=tmp_path / "digits/D/ipc1/x")


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_everything_arrives_in_order(wandb, tmp_path, capfd):
    calls = wandb()
    log = start(tmp_path)
    records = [{"kind": "step", "iteration": i, "loss": [1.5, 2]} for i in range(300)]
    for record in records:
        log.log(record)
    log.finish()
    (imported, (init, keywords), *logged, finished) = calls()
    assert imported == ["import", False]  # nobody can be asked for an account
    assert init == "init"
    assert keywords["mode"] == "online"
    assert keywords["config"] == {"lr": 0.1, "path": "x"}
    assert keywords["dir"] == str(tmp_path / "digits/D/ipc1/x")
    assert keywords["group"] == "digits/D/ipc1/x"
    assert logged == [["log", record] for record in records]
    assert finished == ["finish", 0]
    assert capfd.readouterr() == ("", "")


def test_disabled_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert start(tmp_path, "disabled") is None


def test_offline_says_how_to_upload(wandb, tmp_path, capfd):
    wandb()
    start(tmp_path, "offline").finish()
    (line,) = capfd.readouterr().out.splitlines()
    assert line == "wandb logged offline; to upload: wandb sync /somewhere/run-1"


@pytest.mark.parametrize("fault", ["import fails", "init fails", "log fails"])
def test_a_failure_is_one_line_when_it_happens(wandb, tmp_path, capfd, fault):
    calls = wandb(fault)
    log = start(tmp_path)
    log.log({"iteration": 0})
    wait_for(lambda: log._is_over)
    log.log({"iteration": 1})
    log.finish()
    (line,) = capfd.readouterr().out.splitlines()
    assert line == "going on without wandb: [Errno 28] No space left on device"
    assert calls()[-1][0] == fault.split()[0]


def test_a_process_that_dies_is_one_line(wandb, tmp_path, capfd):
    wandb("log dies")
    log = start(tmp_path)
    log.log({"iteration": 0})
    log.finish()
    assert capfd.readouterr().out == "going on without wandb: its process has ended\n"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("init hangs", "going on without wandb: it had not started when the run ended"),
        ("log hangs", "wandb could not send everything in time; to upload: wandb sync /somewhere"),
        ("finish hangs", "wandb could not send everything in time; to upload: wandb sync /some"),
        ("finish times_out", "wandb could not send everything in time; to upload: wandb sync /so"),
    ],
)
def test_what_hangs_is_waited_for_at_the_end_alone(
    wandb, tmp_path, capfd, monkeypatch, fault, line
):
    calls = wandb(fault)
    monkeypatch.setattr(wandb_log, "WAIT_SECONDS", 0.5)
    log = start(tmp_path)
    log.log({"iteration": 0})
    if not fault.startswith("finish"):
        wait_for(lambda: (tmp_path / "notes").exists() and calls()[-1][0] == fault.split()[0])
    else:
        wait_for(lambda: (tmp_path / "notes").exists() and calls()[-1][0] == "log")
    log.log({"iteration": 1})
    began = time.monotonic()
    log.finish()
    assert time.monotonic() - began < 3
    (said,) = capfd.readouterr().out.splitlines()
    assert said.startswith(line)
    assert not psutil.pid_exists(log._process.pid)


def test_a_backlog_is_bounded_and_one_line(wandb, tmp_path, capfd, monkeypatch):
    wandb("init hangs")
    monkeypatch.setattr(wandb_log, "WAIT_SECONDS", 0.2)
    log = start(tmp_path)
    slowest = 0.0
    for i in range(2 * wandb_log.BACKLOG):
        began = time.monotonic()
        log.log({"iteration": i})
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1
    assert log._lines.qsize() <= wandb_log.BACKLOG
    assert capfd.readouterr().out == "wandb is 10000 records behind, and misses some\n"
    log.finish()


def test_no_process_no_wandb(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert start(tmp_path) is None
    assert "going on without wandb: [Errno 12]" in capsys.readouterr().out


RUN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's & has it ignored
sys.path.insert(0, sys.argv[1])
from utils.run import wandb_log
wandb_log.WAIT_SECONDS = 60
log = wandb_log.WandbLog.start(name="x", mode=sys.argv[3], config={}, folder=Path(sys.argv[2]))
log.log({"kind": "step", "iteration": 0, "loss": 0.5})
print(log._process.pid, flush=True)
time.sleep(float(sys.argv[4]))
if sys.argv[5] == "finish":
    log.finish()
"""


def run(tmp_path, mode, seconds, end):
    """A run of its own, in its own process group, with its output in a pipe."""
    command = [sys.executable, "-c", RUN, ROOT, tmp_path, mode, seconds, end]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_a_failed_wandb_run_and_no_process(wandb, tmp_path, number):
    calls = wandb()
    process = run(tmp_path, "online", 60, "finish")
    pid = int(process.stdout.readline())
    wait_for(lambda: (tmp_path / "notes").exists() and calls()[-1][0] == "log")
    os.killpg(process.pid, number)  # as a terminal does
    process.communicate(timeout=60)
    wait_for(lambda: not psutil.pid_exists(pid))
    assert calls()[-1] == ["finish", 1]


@pytest.mark.parametrize("end", ["finish", "exit"])
def test_a_run_ends_at_once_with_or_without_finish(wandb, tmp_path, end):
    wandb("finish hangs" if end == "exit" else "")
    process = run(tmp_path, "online", 0.5, end)
    began = time.monotonic()
    process.communicate(timeout=10)  # to the end of its output too
    assert process.returncode == 0
    assert time.monotonic() - began < 5


def test_the_real_wandb_offline(tmp_path):
    process = run(tmp_path, "offline", 0, "finish")
    out, _ = process.communicate(timeout=60)
    (folder,) = re.findall(r"wandb logged offline; to upload: wandb sync (\S+)\n", out)
    assert Path(folder).parent == tmp_path / "wandb"
    (file,) = Path(folder).glob("*.wandb")
    assert b"loss" in file.read_bytes()


def test_the_real_wandb_without_a_key_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    process = run(tmp_path, "online", 0, "finish")
    out, _ = process.communicate(timeout=60)
    assert "going on without wandb: No API key configured" in out
