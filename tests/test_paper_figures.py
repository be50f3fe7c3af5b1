"""paper_figures.sh: its plan, and the repeats in one process."""

import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from operator import attrgetter

import pytest
import torch
from made_runs import curve, evaluation, steps, write_run
from PIL import Image
from short_runs import SHORT, distill, without_costs

from scripts.figures import __main__ as figures
from scripts.figures import data, drawing, repeats
from scripts.figures import plan as figure_plan
from scripts.figures.plan import STUDIES, distillations, repeat_cells
from scripts.plan.cells import Settings
from scripts.results.runs import read_runs
from utils.config.resolve import resolve
from utils.core.errors import UserError
from utils.options import DistillOptions

SETTINGS = Settings("data", "buffers", "results", "", distill_flags=("--Iteration", "100"))


def options_of(cell):
    """What a cell's command resolves to, with the row's YAML file."""
    words = shlex.split(cell.commands[0])
    flags = words[words.index("--dataset") :]
    yaml = figure_plan.packaged_yaml(cell.name.split("/")[0], "ipc1")
    return resolve(DistillOptions, flags, description="", find_yaml=lambda given: yaml).options


@pytest.fixture(scope="module", params=STUDIES)
def planned(request, tmp_path_factory):
    """A data set, and a folder of runs with the planned settings and made-up records."""
    folder = tmp_path_factory.mktemp("planned")
    for cell in distillations(request.param, SETTINGS):
        options = options_of(cell)
        end = options.syn_steps if options.length == "fixed" else 2
        distances = [3, 2] + [4] * (options.syn_steps - 2)
        records = [curve(0, distances, end), *steps([end] * 100, [2] * 100)]
        records.insert(-1, records[0] | {"iteration": 99})
        if options.eval_it:
            records += [evaluation(at, 0.5, set=set) for at in (0, 100) for set in ("raw", "ema")]
        config = asdict(options) | {"model": "ConvNetD2"}
        path = write_run(folder / options.run_name, records, **config)
        for tag in ("0", "best"):
            Image.new("RGB", (40, 8), "grey").save(path / f"images_{tag}.png")
    for cell in repeat_cells(request.param, SETTINGS, repeats=3):
        assert " scripts.figures.repeats 3 " in cell.commands[0]
        options = options_of(cell)
        for seed in range(3):
            named = replace(options, seed=seed, run_name=f"{options.run_name}_seed{seed}")
            write_run(folder / named.run_name, steps([4] * 100, [2] * 100), **asdict(named))
    return request.param, folder


def test_every_figure_finds_all_runs_that_are_planned_for_it(planned):
    dataset, folder = planned
    study = STUDIES[dataset]
    runs, problems = read_runs([folder], attrgetter("steps"))
    assert problems == []
    mismatches = data.mismatches(runs, gamma=2, interval=50).query("policy == 'fixed'")
    assert tuple(mismatches["syn_steps"].unique()) == study.fixed
    lengths = data.chosen_lengths(runs).index.get_level_values("syn_steps")
    assert tuple(lengths.unique()) == study.att
    curves = data.distance_curves(runs)
    assert curves.groupby("iteration").size().tolist() == [2, 2]
    accuracies = data.accuracies(runs).groupby(["policy", "set"])["seeds"].max()
    assert accuracies.to_dict() == {
        (policy, set): study.seeds for policy in ("att", "fixed") for set in ("raw", "ema")
    }
    for _, found in data.successes(runs).groupby(["rate", "policy"]):
        assert found["multiplier"].tolist() == pytest.approx(study.multipliers)
        assert found["repeats"].tolist() == [3] * len(study.multipliers)


def test_all_figures_are_drawn_as_png_and_pdf(planned, tmp_path, monkeypatch):
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)
    dataset, folder = planned
    drawn = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda *args: drawn.append(args[0]) or save(*args))
    assert figures.main([str(folder), "--out", str(tmp_path)]) == 0
    names = [f"{name}_{dataset}" for name in figures.figures(gamma=2, interval=50)]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")
    }
    assert all(path.stat().st_size > 400 for path in tmp_path.iterdir())
    *plots, _ = drawn
    for figure in plots:
        assert all(axes.get_xlabel() or axes.get_shared_x_axes() for axes in figure.axes)
        assert figure.axes[0].get_ylabel() and figure.axes[-1].get_xlabel()
        assert figure.legends


def test_a_dry_run_prints_all_commands_and_does_nothing(tmp_path, capsys):
    where = ["--save_path", str(tmp_path / "r"), "--buffer_path", str(tmp_path / "b")]
    argv = ["--dataset", "CIFAR10", "--dry-run", "--run", *where]
    assert figure_plan.main(argv) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert f"buffer.py --dataset CIFAR10 --model ConvNetD3 --buffer_path {tmp_path}/b " in out
    assert "-m scripts.figures.repeats 20 --dataset CIFAR10 " in out
    assert f"figures: .venv/bin/python -m scripts.figures {tmp_path}/r/CIFAR10 " in out
    cells = [line for line in out.splitlines() if line.startswith("CIFAR10/") and ": " not in line]
    assert len(cells) == 7 + 2 + 4 + 2 + 2 * 7


def test_what_is_planned_is_worked_on_and_drawn(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(figure_plan, "run_plan", lambda *plan: planned.append(plan) or 0)
    drawn = []

    def draw(command):
        drawn.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(figure_plan.subprocess, "run", draw)
    argv = ["--dataset", "digits", "--run", "--save_path", str(tmp_path)]
    assert figure_plan.main([*argv, "--", "--Iteration", "7"]) == 1  # no figures, not all is done
    ((experts, rows, _, logs),) = planned
    assert len(rows) == len({row.name for row in rows}) == 4 + 2 + 3 + 2 + 2 * 7
    assert {row.needs for row in rows} == {"experts/digits/ConvNetD2"}
    assert all(row.commands[0].endswith(" --Iteration 7") for row in rows)
    assert [expert.name for expert in experts] == ["experts/digits/ConvNetD2"]
    assert logs == tmp_path / "logs"
    assert drawn[0][:3] == [".venv/bin/python", "-m", "scripts.figures"]
    repeats = next(row for row in rows if row.name.endswith("repeats_att_base_x1"))
    assert len(repeats.outputs) == 20
    assert repeats.outputs[19].name == "repeats_att_base_x1_seed19"


def test_bad_flags_of_distillations_are_refused_before_any_work(tmp_path):
    argv = ["--dataset", "digits", "--run", "--save_path", str(tmp_path / "r")]
    with pytest.raises(UserError, match="--lenght"):
        figure_plan.main([*argv, "--", "--lenght", "fixed"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def repeat_flags(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["repeats.py"])
    where = ["--buffer_path", str(experts), "--save_path", str(tmp_path)]
    return [*SHORT, *where, "--Iteration", "2", "--eval_it", "0", "--run_name", "few"]


def test_repeats_are_the_runs_of_calls_of_their_own(repeat_flags, experts, tmp_path):
    assert repeats.main(["2", *repeat_flags]) == 0
    few = [tmp_path / f"digits/ConvNetD1/ipc1/few_seed{seed}" for seed in (0, 1)]
    alone = ["--Iteration", "2", "--eval_it", "0", "--seed", "1"]
    assert without_costs(few[1]) == without_costs(distill(experts, tmp_path / "alone", *alone))
    assert without_costs(few[0]) != without_costs(few[1])
    assert not list(tmp_path.glob("digits/*/*/few*/distilled*"))
    config = (few[1] / "config.yaml").read_text()
    assert "command: python distill_att.py --dataset digits" in config.replace("\n   ", "")

    before = {path: path.stat().st_mtime_ns for path in few[0].iterdir()}
    assert repeats.main(["3", *repeat_flags]) == 0
    assert {path: path.stat().st_mtime_ns for path in few[0].iterdir()} == before
    assert (tmp_path / "digits/ConvNetD1/ipc1/few_seed2/metrics.jsonl").exists()


def test_a_repeat_that_diverges_is_an_outcome_and_is_not_tried_again(
    repeat_flags, tmp_path, capsys
):
    flags = [*repeat_flags, "--lr_lr", "100", "--length", "fixed"]
    for _ in range(2):
        assert repeats.main(["2", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("has ended") == 2
    runs, problems = read_runs([tmp_path], attrgetter("steps"))
    assert problems == []
    assert [run.diverged["rate"] for run in runs] == ["lr_lr"] * 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [([], "nothing"), (["x"], "not x"), (["2", "--dataset", "digits"], "--run_name")],
)
def test_repeats_name_what_is_missing(argv, said):
    with pytest.raises(UserError, match=said):
        repeats.main(argv)


def test_what_was_removed_comes_back(repeat_flags, experts, tmp_path):
    repeats.main(["1", *repeat_flags])
    again = ["--Iteration", "2", "--eval_it", "0", "--seed", "0", "--run_name", "few_seed0"]
    run = distill(experts, tmp_path, *again).with_name("few_seed0")
    saved = torch.load(run / "distilled_last.pt", weights_only=True)
    assert saved["iteration"] == 2
