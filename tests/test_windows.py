"""Windows by simulation: no SIGUSR1, no folders to open, no mapped files to replace."""

import importlib
import sys

import pytest
import torch
from short_runs import SHORT, run

from utils.config import resolve
from utils.core import early, files, stopping


def as_windows(*arguments, cwd):
    return run("tests/forked/as_windows.py", *arguments, cwd=cwd)


def test_the_scripts_start_and_work(tmp_path):
    assert "usage: eval.py" in as_windows("eval.py", "--help", cwd=tmp_path).stdout
    for number in (2, 3):  # the second call adds to the file of the first
        experts = f"--dataset digits --model ConvNetD1 --num_experts {number} --train_epochs 2"
        done = as_windows("buffer.py", *experts.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    flags = ["--run_name", "run", "--wandb", "offline"]
    done = as_windows("distill_att.py", *SHORT, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no wandb beside a run on Windows; to upload: python -m utils.run.wandb" in done.stdout
    run_dir = tmp_path / "results/digits/ConvNetD1/ipc1/run"
    assert b"\r" not in (run_dir / "metrics.jsonl").read_bytes()
    best = ["--distilled", run_dir / "distilled_best.pt", "--num_eval", 1, "--epoch_eval_train", 2]
    done = as_windows("eval.py", *best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # What is imported beside the three scripts.
    code = "import scripts.plan.__main__, scripts.bench, scripts.report.__main__; print('there')"
    (tmp_path / "imports.py").write_text(code)
    done = as_windows(tmp_path / "imports.py", cwd=tmp_path)
    assert done.stdout.strip() == "there", done.stderr


def test_signals_are_those_that_the_system_has():
    named = [number.name for number in stopping.SIGNALS]
    assert named == [name for name in early.NAMES if hasattr(stopping.signal, name)]


def test_the_command_that_continues_is_quoted_for_the_shell_of_the_system(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["buffer.py", "--data_path", "my pictures"])
    monkeypatch.setattr(stopping, "_more_flags", [])
    assert stopping.command() == "python buffer.py --data_path 'my pictures'"
    monkeypatch.setattr(stopping.os, "name", "nt")
    command = stopping.command()
    monkeypatch.undo()
    assert command == 'python buffer.py --data_path "my pictures"'


def test_configurations_on_another_drive_are_found(monkeypatch):
    def on_another_drive(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(resolve.os.path, "relpath", on_another_drive)
    path = resolve.packaged_yaml("CIFAR10", "ipc1")
    assert path == resolve.CONFIGS / "CIFAR10" / "ipc1.yaml"


def test_a_folder_that_cannot_be_opened_does_not_keep_a_file_from_being_written(
    tmp_path, monkeypatch
):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    files.torch_save({"a": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert files.torch_load(tmp_path / "a.pt")["a"].tolist() == [1, 1]


def test_what_cannot_work_there_says_so(monkeypatch):
    monkeypatch.setattr(stopping.os, "name", "nt")
    monkeypatch.delitem(sys.modules, "scripts.faults", raising=False)
    with pytest.raises(SystemExit, match="its faults are those of Unix"):
        importlib.import_module("scripts.faults")
