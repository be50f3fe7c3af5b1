"""Runs on digits that take seconds, and what they write: for several test files."""

import json
import subprocess
import sys
from pathlib import Path

import forking
import pytest
import torch

import buffer
import distill_att
from utils.core.stopping import Interrupted
from utils.data.distilled import SyntheticSet
from utils.data.real_images import class_labels
from utils.experts.files import fill_files, keep_expert, read_file
from utils.methods.outer_state import OuterState

ROOT = Path(__file__).parent.parent
# The smallest network of the family: what is tested here does not depend on its size.
SHORT = (
    "--dataset digits --model ConvNetD1 --Iteration 4 --eval_it 2 --num_eval 2 "
    "--epoch_eval_train 3 --syn_steps 4 --expert_epochs 1 --max_start_epoch 1 --seed 3"
).split()


def run(script, *arguments, cwd=ROOT):
    """Run a script as a user does; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=forking.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_experts(path, number, *arguments):
    argv = "--dataset digits --model ConvNetD1 --train_epochs 2 --num_experts".split()
    assert buffer.main([*argv, str(number), "--buffer_path", str(path), *arguments]) == 0
    return path


def save_expert(folder, number, expert, *, experts_per_file):
    """Write an expert as buffer.py does with the last one of a call; the path of its file."""
    keep_expert(folder, number, expert)
    fill_files(folder, range(number + 1), experts_per_file=experts_per_file)
    return folder / f"replay_buffer_{number // experts_per_file}.pt"


def distill(buffer_path, save_path, *arguments):
    argv = [*SHORT, "--buffer_path", str(buffer_path), "--save_path", str(save_path)]
    assert distill_att.main([*argv, "--run_name", "run", *arguments]) == 0
    return Path(save_path) / "digits/ConvNetD1/ipc1/run"


def digits_set(data, images, **values):
    """A distilled set of one image a class, of `data`, digits; `values` are the other fields."""
    config = {"data_path": "data", "res": 8, "dsa": True, "dsa_strategy": "flip"}
    defaults = {
        "labels": class_labels(10, 1, torch.device("cpu")),
        "syn_lr": 0.02,
        "dataset": "digits",
        "subset": None,
        "ipc": 1,
        "class_names": data.class_names,
        "normalisation": data.normalisation,
        "iteration": 7,
        "config": config | values.pop("config"),
    }
    return SyntheticSet(images=images, **defaults | values)


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def without_costs(run_dir):
    """The records of a run without the time and the memory that it took."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    kept = [record for record in map(json.loads, lines) if record["kind"] != "memory"]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in kept]


def images(path):
    return torch.load(path, weights_only=True)["images"]


def snapshots(buffer_path):
    files = sorted(Path(buffer_path).rglob("replay_buffer_*.pt"))
    return [torch.cat([p.flatten() for p in s]) for f in files for e in read_file(f) for s in e]


def assert_cut_off_goes_on_alike(distil, whole, monkeypatch):
    """Cut the run that `distil()` makes off in its third outer step, continue it by another call,
    and compare it with the uninterrupted run in `whole`.
    """
    update, taken = OuterState.update, []

    def third_is_cut_off(state, step):
        taken.append(step)
        if len(taken) == 3:
            raise Interrupted
        update(state, step)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(OuterState, "update", third_is_cut_off)
        distil()
    run = distil()
    assert without_costs(run) == without_costs(whole)
    sets = {path.name for path in whole.glob("distilled_*.pt")}
    assert sets >= {"distilled_last.pt", "distilled_best.pt"}
    for name in sets:
        ours, theirs = (SyntheticSet.load(folder / name) for folder in (run, whole))
        assert torch.equal(ours.images, theirs.images)
        if theirs.soft_labels is not None:
            assert torch.equal(ours.soft_labels, theirs.soft_labels)
    return run
