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

from utils.run import wandb_follow
from utils.run.log import MetricsLog

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
    dir, url = "/somewhere/run-1/files", "https://wandb/run-1"
    def define_metric(self, *_, **__): pass
    def log(self, record): note("log", record)
    def finish(self, exit_code=0): note("finish", exit_code)

def init(**keywords):
    note("init", keywords)
    return Run()

note("import", sys.stdin.isatty())
"""
LATER = "to upload: python -m utils.run.wandb_follow "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run directory; what is slow here is waited for."""
    monkeypatch.setattr(wandb_follow, "WAIT_SECONDS", 60)
    folder = tmp_path / "digits/D/ipc1/x"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("lr: 0.1\nenvironment: [{torch: 2.12.1}]\n")
    return folder


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A function that sets the fault; it returns what wandb was called with, as a function."""
    notes = tmp_path / "notes"
    notes.touch()
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NOTES", str(notes))

    def prepare(fault=""):
        monkeypatch.setenv("FAULT", fault)
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()]

    return prepare


def start(folder, mode="online", iteration=0):
    log = MetricsLog(folder, wandb_mode=mode)
    log.keep_up_to(iteration, evaluated=-1, rewinds=0)
    return log


def step(iteration):
    return {"kind": "step", "iteration": iteration, "loss": [1.5, 2]}


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(calls):
    return [value for what, value in calls() if what == "log"]


def test_everything_arrives_in_order(wandb, folder, capfd):
    calls = wandb()
    log = start(folder)
    for i in range(300):
        log.log(**step(i))
    log.finish(0)
    (imported, (init, keywords), *_, finished) = calls()
    assert imported == ["import", False]  # nobody can be asked for an account
    assert init == "init"
    assert keywords["mode"] == "online"
    assert keywords["config"] == {"lr": 0.1, "environment": [{"torch": "2.12.1"}]}
    assert keywords["dir"] == str(folder)
    assert keywords["group"] == "digits/D/ipc1/x"
    assert logged(calls) == [step(i) for i in range(300)]
    assert finished == ["finish", 0]
    assert capfd.readouterr() == ("sent to wandb: https://wandb/run-1\n", "")


def test_a_log_that_is_replaced_is_followed_and_sent_once(wandb, folder):
    calls = wandb()
    start(folder, "disabled").log(**step(0))  # an earlier call
    log = start(folder, iteration=1)
    log.log(**step(1))
    wait_for(lambda: logged(calls) == [step(0), step(1)])
    log.keep_up_to(1, evaluated=-1, rewinds=0)  # as a rewind does
    again = step(1) | {"loss": 3}
    log.log(**again)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("no record\n3\n" + json.dumps(step(2)))  # the last line is cut off
    log.finish(1)
    assert logged(calls) == [step(0), step(1), again]
    assert calls()[-1] == ["finish", 1]


def test_disabled_starts_nothing(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    log = start(folder, "disabled")
    log.log(**step(0))
    log.finish(0)
    assert json.loads((folder / "metrics.jsonl").read_text()) == step(0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(f"{what} fails", "[Errno 28] No space left on device") for what in ("import", "init", "log")]
    + [("log dies", "its process has ended")],
)
def test_a_failure_is_one_line_when_it_happens(wandb, folder, capfd, fault, reason):
    calls = wandb(fault)
    log = start(folder)
    log.log(**step(0))
    wait_for(lambda: log._wandb._process.poll() is not None)
    log.log(**step(1))
    expected = f"going on without wandb: {reason}; {LATER}{folder}\n"
    assert capfd.readouterr().out == expected
    log.log(**step(2))
    log.finish(0)
    assert capfd.readouterr().out == ""
    assert calls()[-1][0] == fault.split()[0]


@pytest.mark.parametrize("fault", ["init hangs", "log hangs", "finish hangs", "finish times_out"])
def test_what_hangs_is_waited_for_at_the_end_alone(wandb, folder, capfd, monkeypatch, fault):
    calls = wandb(fault)
    if "hangs" in fault:
        monkeypatch.setattr(wandb_follow, "WAIT_SECONDS", 0.5)
    log = start(folder)
    log.log(**step(0))
    reached = "log" if fault.startswith("finish") else fault.split()[0]
    wait_for(lambda: calls() and calls()[-1][0] == reached)
    began = time.monotonic()
    log.log(**step(1))
    assert time.monotonic() - began < 0.2
    log.finish(0)
    assert time.monotonic() - began < 3
    expected = f"wandb could not send everything in time; {LATER}{folder}\n"
    assert capfd.readouterr().out == expected
    assert not psutil.pid_exists(log._wandb._process.pid)


def test_no_process_no_wandb(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    start(folder).log(**step(0))
    assert "going on without wandb: [Errno 12]" in capsys.readouterr().out


RUN = """
import signal, sys, time
from pathlib import Path
from utils.run.wandb_follow import WandbFollower
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's & has it ignored
follower = WandbFollower.start(Path(sys.argv[1]), "online")
print(follower._process.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


def run(folder, seconds):
    """A run that ends without a word, in its own process group; and the process beside it."""
    (folder / "metrics.jsonl").write_text(f"{json.dumps(step(0))}\n")
    command = [sys.executable, "-c", RUN, str(folder), str(seconds)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_a_failed_wandb_run_and_no_process(wandb, folder, number):
    calls = wandb()
    process, pid = run(folder, 60)
    wait_for(lambda: calls() and calls()[-1][0] == "log")
    os.killpg(process.pid, number)  # as a terminal does
    process.communicate(timeout=60)
    wait_for(lambda: not psutil.pid_exists(pid))
    assert calls()[-1] == ["finish", 1]


def test_a_run_ends_at_once_without_finish(wandb, folder):
    wandb("finish hangs")
    began = time.monotonic()
    process, pid = run(folder, 0.5)
    process.communicate(timeout=10)  # to the end of its output too
    assert process.returncode == 0
    assert time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)


def upload(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "utils.run.wandb_follow", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_an_old_run_is_uploaded(wandb, folder):
    calls = wandb()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step(i))}\n" for i in range(9)))
    assert "sent to wandb: https://wandb/run-1\n" in upload(folder).stdout
    assert logged(calls) == [step(i) for i in range(9)]
    assert calls()[-1] == ["finish", 0]


def test_an_upload_that_cannot_be_is_one_line(wandb, folder):
    wandb("init fails")
    result = upload(folder)
    assert result.returncode == 2
    assert re.fullmatch(r"wandb_follow.py: error: .*/x is no run .*metrics.jsonl\n", result.stderr)
    (folder / "metrics.jsonl").touch()
    result = upload(folder)
    assert result.returncode == 2
    assert result.stderr.endswith("wandb_follow.py: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("how", ["beside a run", "afterwards"])
def test_the_real_wandb_offline(folder, capfd, how):
    log = start(folder, "offline" if how == "beside a run" else "disabled")
    log.log(**step(0))
    log.finish(0)
    if how == "afterwards":
        print(upload(folder, "--mode", "offline").stdout)
    out = capfd.readouterr().out
    (files,) = re.findall(r"wandb logged offline; to upload: wandb sync (\S+)\n", out)
    assert Path(files).parent == folder / "wandb"
    (file,) = Path(files).glob("*.wandb")
    assert b"loss" in file.read_bytes()


def test_the_real_wandb_without_a_key_asks_nobody(folder, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    start(folder).finish(0)
    assert "going on without wandb: No API key configured" in capfd.readouterr().out
