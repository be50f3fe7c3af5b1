"""Two processes under torchrun give what one gives, in float64, and end together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forking
import psutil
import pytest
import torch
from short_runs import without_costs

import buffer
import distill_att
import eval as evaluation
from utils.core import ranks
from utils.experts.files import read_file

ROOT = Path(__file__).parent.parent
DATA = "--dataset digits --model ConvNetD1 --precision fp64".split()
SHORT = [*DATA, *"--Iteration 3 --eval_it 3 --num_eval 3 --epoch_eval_train 2 --ipc 1".split()]
RUN = [*SHORT, *"--syn_steps 3 --expert_epochs 1 --max_start_epoch 1".split()]
REAL_LOSS = [*SHORT, "--batch_target", "51"]
WAYS = {
    "batches": RUN,
    "uneven_batches": [*RUN, "--batch_syn", "3", "--micro_batch", "1"],
    "trajectories": [*RUN, "--trajectories", "4"],
    "soft_labels": [*RUN, "--soft_labels", "--batch_syn", "3"],
    "bptt": [*REAL_LOSS, *"--method bptt --syn_steps 3 --window 2".split()],
    "bptt_of_two": [*REAL_LOSS, *"--method bptt --syn_steps 3 --students 2".split()],
    "dd": [*REAL_LOSS, *"--method dd --distill_steps 1 --distill_epochs 2".split()],
    "dsa": [*SHORT, *"--method dsa --outer_loop 2 --inner_loop 3 --batch_syn 7".split()],
    "cafe": [*SHORT, *"--method cafe_dsa --max_loop 2 --batch_syn 7 --batch_real 30".split()],
    "kip": [*REAL_LOSS, *"--method kip --learn_labels --micro_batch 7".split()],
    "label_solve": [*SHORT, *"--method label_solve --micro_batch 100".split()],
    "ld": [*REAL_LOSS, *"--method ld --batch_syn 5 --restart_after 1 --lr_adam 0.1".split()],
}


def torchrun(script, *argv, env=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / script), *map(str, argv)]
    env = env or forking.environment()
    return subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def commands(where):
    """Experts, one run for each of WAYS and an evaluation, in folders below `where`."""
    paths = ["--buffer_path", str(where / "b")]
    made = [*DATA, *"--num_experts 3 --train_epochs 2".split()]
    yield "buffer", [*made, *paths]
    yield "buffer", [*made, *paths, "--easy_first", "--el2n_experts", "3"]
    for name, flags in WAYS.items():
        yield "distill_att", [*flags, *paths, "--save_path", str(where), "--run_name", name]
    few = "--num_eval 3 --epoch_eval_train 2 --random --precision fp64".split()
    yield "eval", ["--distilled", str(run_dir(where, "batches") / "distilled_last.pt"), *few]


def run_dir(where, name):
    return where / "digits/ConvNetD1/ipc1" / name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    where = tmp_path_factory.mktemp("one")
    mains = {"buffer": buffer.main, "distill_att": distill_att.main, "eval": evaluation.main}
    for script, argv in commands(where):
        assert mains[script](argv) == 0
    return where


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    where = tmp_path_factory.mktemp("two")
    process = torchrun("tests/run_in_ranks.py", json.dumps(list(commands(where))))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("done: sets and pictures are in") == len(WAYS)  # the main process alone talks
    return where


def test_the_files_are_the_same(one, two):
    def names(where):
        return {path.relative_to(where) for path in where.rglob("*") if path.is_file()}

    assert names(two) == names(one)


def test_experts_are_the_same(one, two):
    files = [sorted(where.rglob("replay_buffer_*.pt")) for where in (one, two)]
    ours, theirs = ([expert for file in each for expert in read_file(file)] for each in files)
    assert len(ours) == 2 * 3  # ordinary ones, and others that were trained easy-first
    pairs = zip(ours, theirs, strict=True)
    for expert, other in pairs:
        for snapshot, same in zip(expert, other, strict=True):
            for param, equal in zip(snapshot, same, strict=True):
                torch.testing.assert_close(param, equal, rtol=0, atol=1e-7)  # saved as float32


@pytest.mark.parametrize("name", WAYS)
def test_a_run_is_the_same(one, two, name):
    states = [
        torch.load(run_dir(where, name) / "checkpoint.pt", weights_only=True)["state"]
        for where in (one, two)
    ]
    assert states[0]["iteration"] == 3
    tensors = {key: value for key, value in states[0].items() if isinstance(value, torch.Tensor)}
    assert len(tensors) >= 2  # images and their moving average at least
    for key, value in tensors.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(states[1][key], value, rtol=1e-9, atol=1e-9)
    logs = [without_costs(run_dir(where, name)) for where in (one, two)]
    for record, other in zip(*logs, strict=True):
        assert list(record) == list(other)
        for key in record:
            assert other[key] == (
                pytest.approx(record[key], rel=1e-9) if isinstance(record[key], float)
                else record[key]
            )  # fmt: skip


def test_an_evaluation_is_the_same(one, two):
    ours, theirs = (
        json.loads((run_dir(where, "batches") / "eval.json").read_text()) for where in (one, two)
    )
    assert [entry["accs"] for entry in ours] == [entry["accs"] for entry in theirs]
    assert [len(entry["accs"]) for entry in ours] == [3, 3]


def test_more_processes_than_work_is_one_line(one):
    argv = [*RUN, "--buffer_path", one / "b", "--save_path", one / "r", "--trajectories", 3]
    process = torchrun("distill_att.py", *argv)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if "distill_att.py: error:" in line]
    assert lines == [
        "distill_att.py: error: --trajectories 3 cannot be divided over 2 processes: choose a "
        "multiple of 2, or 1 to divide the inner batches"
    ]
    assert not (one / "r").exists()


def test_a_process_that_dies_ends_the_run(one, tmp_path):
    argv = [*RUN, "--buffer_path", one / "b", "--save_path", tmp_path, "--run_name", "x"]
    endless = ["--Iteration", 10**6, "--eval_it", 0, "--compile", "off"]
    process = torchrun("distill_att.py", *argv, *endless, env=os.environ)
    metrics = run_dir(tmp_path, "x") / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not metrics.exists() or not metrics.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children()
        max(workers, key=psutil.Process.create_time).kill()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "SIGKILL" in err or "Signal 9" in err


def test_shares_are_disjoint_and_whole(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.rounds_of_this_rank(list(range(10)), 2))
    assert [len(part) for part in parts] == [2, 2, 2]  # as many rounds for everyone
    assert [part[0] for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert sorted(i for part in parts for own in part for i in own) == list(range(10))
