"""scripts/folder: what is chosen for the time given, what is refused, the command as a whole."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forking
import numpy as np
import pytest
from PIL import Image
from short_runs import ROOT

import distill_att
from scripts.folder import __main__ as command
from scripts.folder import choose as choosing
from scripts.folder import look
from scripts.folder.choose import EXPERTS, OUTER_STEPS, Found, Speed, candidates, choose
from scripts.folder.job import DISTILLING, Job
from scripts.report import __main__ as report
from utils.compute.cost import network_cost
from utils.core import stopping
from utils.core.errors import UserError

FOUND = Found(classes=2, channels=3, train=80, test=40, smallest_class=40, short_side=40)
FAST, SLOW = Speed(1e13), Speed(2e9, step_seconds=0.002)


def count(model, res):
    return network_cost(model, channels=3, num_classes=2, image_size=res)


def plan_for(seconds, *, found=FOUND, speed=SLOW, ipc=10):
    return choose(found, count, lambda model, res: speed, ipc=ipc, seconds=seconds)


# What is chosen


@pytest.mark.parametrize("seconds", [300, 600, 1800, 36_000])
def test_a_plan_takes_the_time_given(seconds):
    plan = plan_for(seconds)
    assert plan.seconds <= seconds
    assert plan.Iteration >= choosing.WORTH_IT
    is_most = plan.Iteration == OUTER_STEPS[1] or plan.num_experts == EXPERTS[1]
    assert is_most or plan.seconds > 0.85 * seconds


def test_more_time_and_faster_machines_have_larger_networks():
    costs = [count(plan.model, plan.res).flop for plan in map(plan_for, (60, 300, 3600, 36_000))]
    assert costs == sorted(costs) and costs[0] < costs[-1]
    assert plan_for(60, speed=FAST).model == "ConvNetD3"


@pytest.mark.parametrize(
    ("short_side", "largest"), [(4, 8), (8, 8), (28, 32), (40, 32), (64, 64), (500, 128)]
)
def test_pictures_are_not_enlarged(short_side, largest):
    assert candidates(short_side)[0][0] == largest
    found = replace(FOUND, short_side=short_side)
    assert plan_for(10**6, found=found, speed=FAST).res == largest


def test_too_little_time_takes_the_least_that_is_worth_it():
    plan = plan_for(1)
    assert plan.seconds > 1
    assert (plan.num_experts, plan.Iteration, plan.num_eval) == (3, 20, 2)


def test_experts_stay_within_the_disk():
    found = replace(FOUND, train=10_000, short_side=500)
    plan = plan_for(10**7, found=found, speed=FAST)
    network = network_cost(plan.model, channels=3, num_classes=2, image_size=plan.res)
    written = plan.num_experts * (plan.train_epochs + 1) * 4 * network.parameters
    assert written <= choosing.DISK


def test_numbers_are_settled_by_what_the_first_ones_took():
    plan = replace(plan_for(600), num_experts=40, expert_seconds=100)
    assert [choosing.experts_that_fit(3, each, plan) for each in (1, 5, 1000)] == [40, 20, 3]
    assert choosing.steps_that_fit(8, 0.5, 100) == 208
    assert choosing.steps_that_fit(8, 0.5, -30) == OUTER_STEPS[0]
    assert choosing.steps_that_fit(500, 0.5, -30) == 500


# What is refused


def pictures(folder, split, *, classes="ab", number=4, side=8):
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        rng = np.random.default_rng(label)
        for n in range(number):
            noise = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise + 130 * np.uint8(label)).save(folder / split / name / f"{n}.png")


@pytest.fixture
def folder(tmp_path):
    """Two classes that a network tells apart at once."""
    pictures(tmp_path / "my pictures", "train")
    pictures(tmp_path / "my pictures", "test")
    return tmp_path / "my pictures"


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "x", "0.0", "", "1e999"])
def test_minutes_are_a_number_above_0(folder, given):
    with pytest.raises(UserError, match=r"--minutes: .* is no number of minutes above 0"):
        command.main([str(folder), f"--minutes={given}"])


@pytest.mark.parametrize("given", ["0", "-2", "1.5", "x"])
def test_ipc_is_a_whole_number(folder, given):
    with pytest.raises(UserError, match=r"--ipc: .* is no whole number from 1 on"):
        command.main([str(folder), f"--ipc={given}"])


def test_a_class_has_as_many_images_as_are_asked_for(folder, tmp_path):
    with pytest.raises(UserError, match="--ipc 5 is more than the 4 training images of class a"):
        command.main([str(folder), "--ipc", "5", "--out", str(tmp_path / "out")])


def test_what_is_in_the_folder(tmp_path):
    out = ["--out", str(tmp_path / "out")]
    for wrong, said in (
        ("none", "is no folder"),
        ("empty", "no data: looked for the folders train and test or val"),
        ("one", "has one class, a"),
        ("no_pictures", "no images in the class folder"),
    ):
        path = tmp_path / wrong
        if wrong != "none":
            path.mkdir()
        if wrong in ("one", "no_pictures"):
            pictures(path, "train", classes="a" if wrong == "one" else "ab")
        if wrong in ("one", "no_pictures"):
            number = 0 if wrong == "no_pictures" else 4
            pictures(path, "test", classes="a" if wrong == "one" else "ab", number=number)
        with pytest.raises(UserError, match=said):
            command.main([str(path), *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["train", "."])
def test_a_part_is_held_out_where_there_are_no_test_images(tmp_path, inside):
    pictures(tmp_path, inside, classes="ab", number=10)
    flags = look.find_flags(tmp_path)
    assert flags[-2:] == ["--test_fraction", look.TEST_FRACTION]
    source = look.find_source(flags)
    assert {name: len(labels) for name, labels in source.labels.items()} == {"train": 16, "test": 4}


def test_the_shell_script_refuses_a_folder_that_is_not_there_before_it_installs(tmp_path):
    script = tmp_path / "scripts"
    script.mkdir()
    for name in ("distil_folder.sh", "setup.sh"):
        (script / name).write_text((ROOT / "scripts" / name).read_text())
    done = subprocess.run(
        ["bash", script / "distil_folder.sh", "nowhere"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"distil_folder\.sh: error: nowhere is no folder[^\n]*\n", done.stderr)
    assert not (tmp_path / ".venv").exists()


def test_paths_are_those_of_the_folder_that_it_is_called_from(tmp_path):
    """The shell script passes on where it was called and how; options may come first."""
    (tmp_path / "repository/scripts").mkdir(parents=True)
    (tmp_path / "repository/.venv/bin").mkdir(parents=True)
    for name in ("distil_folder.sh", "setup.sh"):
        text = (ROOT / "scripts" / name).read_text().replace('install_requirements "$@"', "")
        (tmp_path / "repository/scripts" / name).write_text(text)
    python = tmp_path / "repository/.venv/bin/python"
    python.write_text(f'#!/bin/sh\ncd {ROOT}; exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = "repository/scripts/distil_folder.sh"
    call = ["bash", script, "--minutes", "1", "--out", "o", "pets"]
    done = subprocess.run(call, cwd=tmp_path, env=forking.environment(), capture_output=True)
    assert done.stderr.decode().startswith(
        f"distil_folder.sh: error: {tmp_path / 'pets'} is no folder"
    )
    call[-1] = ""
    done = subprocess.run(call, cwd=tmp_path, env=forking.environment(), capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"argument folder: it is empty" in done.stderr


@pytest.mark.parametrize("given", ["o", "../o", "/o"])
def test_out_is_a_path_of_the_caller(given, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTIL_FOLDER_FROM", str(tmp_path))
    assert command.parse(["pets", "--out", given]).out == tmp_path / given
    assert command.parse(["pets"]).folder == tmp_path / "pets"
    assert command.parse(["pets"]).out == Path.cwd() / "results" / "pets_30min"  # beside scripts/
    monkeypatch.setenv("DISTIL_FOLDER_FROM", str(Path.cwd()))
    assert command.parse(["pets"]).out == Path("results", "pets_30min")


# The command as a whole


@pytest.fixture
def few(monkeypatch):
    """The least of everything."""
    for name, value in {
        "EPOCHS": (4, 4),
        "EXPERTS": (2, 2),
        "OUTER_STEPS": (10, 10),
        "NETWORKS": (2, 2),
        "NETWORK_EPOCHS": (3, 3),
    }.items():
        monkeypatch.setattr(choosing, name, value)


def test_the_command_goes_on_after_an_interruption(folder, tmp_path, few, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = [str(folder), "--minutes", "0.01", "--ipc", "1", "--out", str(out)]
    distil = distill_att.main

    def interrupt(flags):
        distil(flags)
        monkeypatch.setattr(stopping, "_first", (2, 0.0))
        raise stopping.Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(distill_att, "main", interrupt)
        assert command.main(argv) == 130
    monkeypatch.setattr(stopping, "_first", None)
    said = capsys.readouterr()
    assert "found 2 classes, 8 training and 8 test pictures" in said.out
    assert "0.01 minutes are too few" in said.out
    assert re.search(r": interrupted; to continue: [^\n]+\n$", said.err)
    begun = Job.load(out)
    assert begun.used[DISTILLING] > 0 and begun.experts == 2
    (experts,) = (out / "buffers").rglob("replay_buffer_0.pt")
    trained = experts.stat().st_mtime_ns

    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert experts.stat().st_mtime_ns == trained
    assert "continuing at iteration 8" in said
    for part in ("distilled raw", "random real", "k-center", "predicted  used", "report.html"):
        assert part in said.partition("--- result")[2], part
    page = (out / "report.html").read_text()
    assert "found 2 classes" in page and "<td>in all</td>" in page
    assert report.main(["--html", str(begun.run)]) == 0
    assert "<td>in all</td>" in (begun.run / "report.html").read_text()
    entries = json.loads((begun.run / "eval.json").read_text())
    assert [len(entry["accs"]) for entry in entries] == [2, 2, 2]
    assert sum(map(sum, entries[0]["confusion"])) == 2 * 8

    for flag, planned in (("--minutes", "0.01"), ("--ipc", "1")):
        with pytest.raises(UserError, match=rf"^{flag} 3: .* planned with {flag} {planned}; "):
            command.main([*argv, flag, "3"])

    (folder / "train/a/0.png").unlink()
    with pytest.raises(UserError, match=r"made from .* 7 training|7 train images instead of 8"):
        command.main(argv)


def test_real_images_that_are_as_good_are_named():
    distilled = {"trained_on": "distilled raw", "set": "raw", "mean": 50.0}
    others = [
        {"trained_on": name, "set": "", "mean": mean}
        for name, mean in (("random real", 49.0), ("k-center", 50.0))
    ]
    (said,) = command.verdict([distilled, *others])
    assert "no better than k-center:" in said
    assert command.verdict([distilled, others[0]]) == []


def test_a_bad_call_is_one_line_and_status_2(folder):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.folder", str(folder), "--minutes", "0"],
        cwd=ROOT,
        env=forking.environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"distil_folder\.sh: error: [^\n]+\n", done.stderr)
