"""A signal in the middle of work that does not end: what was there before it is kept."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forking
import pytest
import torch
from short_runs import ROOT, SHORT, digits_set, distill, images, snapshots, without_costs

import eval as evaluation
from utils.core import stopping
from utils.core.rng import stream
from utils.data.dataset import load_dataset
from utils.data.real_images import random_real_images
from utils.experts.files import unfinished_file

EXPERTS = "--dataset digits --model ConvNetD1 --train_epochs 2 --num_experts 2".split()
EVAL = "--model MLP --epoch_eval_train 3 --num_eval 3 --eval_at_once 1".split()


def leave(folder, number, script, *argv, launcher=()):
    """Interrupt `script` in its step or training `number`; its status and last words."""
    command = [sys.executable, *launcher, str(ROOT / "tests/stuck.py"), str(number), script, *argv]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=forking.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "stuck").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    return process.returncode, err


def check_last_words(err, script, argv):
    lines = re.split(r"[\r\n]+", err)
    said = [line for line in lines if line.strip() and not re.search(r"\d/\d+ \[", line)]
    continues = shlex.join([script, *map(str, argv)])
    assert said == [f"{script}: interrupted; to continue: python {continues}"]


def distillation(experts, tmp_path):
    return [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--run_name", "run"]


def test_an_outer_step_is_given_up_and_repeated(finished, experts, tmp_path):
    argv = distillation(experts, tmp_path)
    status, err = leave(tmp_path, 3, "distill_att.py", *argv)
    assert status == 143
    check_last_words(err, "distill_att.py", argv)
    run_dir = tmp_path / "digits/ConvNetD1/ipc1/run"
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["state"]["iteration"] == 3
    assert distill(experts, tmp_path) == run_dir
    assert without_costs(run_dir) == without_costs(finished)
    for name in ("distilled_last.pt", "distilled_ema_last.pt"):
        assert torch.equal(images(run_dir / name), images(finished / name))


def test_an_epoch_is_given_up_and_repeated(experts, tmp_path):
    argv = [*EXPERTS, "--buffer_path", tmp_path / "b"]
    status, err = leave(tmp_path, 3, "buffer.py", *argv)
    assert status == 143
    check_last_words(err, "buffer.py", argv)
    folder = tmp_path / "b/digits/ConvNetD1"
    assert len(torch.load(unfinished_file(folder, 1))["trajectory"]) == 2
    assert {path.suffix for path in folder.iterdir()} <= {".pt", ".json", ".lock", ""}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "buffer.py"), *map(str, argv)],
        env=forking.environment(),
        capture_output=True,
        text=True,
    )
    assert "going on with expert 1 after 1 epochs" in ended.stdout, ended.stderr
    pairs = zip(snapshots(tmp_path / "b"), snapshots(experts), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_evaluation_keeps_the_networks_that_are_trained(tmp_path):
    data = load_dataset("digits")
    chosen = random_real_images(data, 1, stream(0, "test"))
    made = digits_set(data, chosen, model="MLP", set="raw", config={"batch_train": 256})
    made.save(tmp_path / "distilled_x.pt", include_whitening=True)
    argv = ["--distilled", tmp_path / "distilled_x.pt", *EVAL]
    status, err = leave(tmp_path, 4, "eval.py", *argv)  # a network takes two trainings
    assert status == 143
    check_last_words(err, "eval.py", argv)
    kept = json.loads((tmp_path / "eval_unfinished.json").read_text())
    assert [entry["network"] for entry in kept] == [0, 1]
    assert evaluation.main(list(map(str, argv))) == 0
    (entry,) = json.loads((tmp_path / "eval.json").read_text())
    assert entry["accs"][:2] == [each["acc"] for each in kept]


@pytest.mark.slow
def test_processes_together_give_a_step_up(finished, experts, tmp_path):
    """The main one keeps the state; torchrun says that they have left."""
    argv = distillation(experts, tmp_path)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    _, err = leave(tmp_path, 2, "distill_att.py", *argv, launcher=launcher)
    assert err.count("interrupted; to continue: torchrun ... ") == 1
    checkpoint = tmp_path / "digits/ConvNetD1/ipc1/run/checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["state"]["iteration"] == 2
    assert not [path for path in checkpoint.parent.iterdir() if path.name.endswith(".tmp")]


def test_what_a_script_has_started_ends_with_it_but_not_what_leads_a_session():
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def script():
        sleep = ["sleep", "60"]
        children = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
        there.send([child.pid for child in children])
        stopping.end(7)

    process = fork.Process(target=script)
    process.start()
    mine, other = here.recv()
    process.join(10)
    assert process.exitcode == 7
    assert (is_running(mine), is_running(other)) == (False, True)
    os.kill(other, signal.SIGKILL)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["buffer.py", "distill_att.py", "eval.py", "-m scripts.folder"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_while_a_script_is_being_imported_it_leaves_with_one_line(name, number, tmp_path):
    """What it imports next, a torch that sends the signal, is never read to its end."""
    (tmp_path / "torch.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(number)})\nraise SystemExit('went on')\n"
    )
    for other in ("tqdm", "psutil"):
        (tmp_path / f"{other}.py").write_text("import torch\n")
    done = subprocess.run(
        [sys.executable, *name.split(), "--ipc", "my ipc"],
        cwd=ROOT,
        env=forking.environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    again = f"python {name}" if name.endswith(".py") else "bash scripts/distil_folder.sh"
    said = f"{again.split()[1].split('/')[-1]}: interrupted; to continue: {again} --ipc 'my ipc'\n"
    assert (done.returncode, done.stdout) == (130 if number == signal.SIGINT else 143, "")
    assert done.stderr == said
