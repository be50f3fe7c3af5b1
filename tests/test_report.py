"""scripts/report: published figures, run directories with known answers, and bad ones."""

import csv
import json
import shutil
from dataclasses import asdict
from functools import partial

import made_runs
import pytest
import yaml

from scripts.plan.cells import Row, row_options
from scripts.report import __main__ as report
from scripts.report.markdown import not_run, table_row
from scripts.report.runs import group_runs, run_lines
from scripts.report.tables import TABLES, planned_rows, read_published, table_lines
from scripts.results import runs
from scripts.results.evaluations import Score, with_evaluations
from scripts.results.runs import method_name
from utils.config.resolve import CONFIGS
from utils.core.errors import UserError
from utils.measure.protocol import Accuracies
from utils.options import DistillOptions

ROW = Row("CIFAR10", None, 10)
EXPERTS = {"number": 100, "epochs": 50, "lr_teacher": 0.01}
CALL = {
    "command": "python distill_att.py --ipc 10",
    "git_commit": "abc123",
    "python": "3.11.7",
    "torch": "2.12.1",
    "device": "a GPU",
}
ARCHITECTURES = ("ConvNet", "ResNet18", "VGG11", "AlexNet")
PUBLISHED, PLANNED = read_published(), planned_rows()
SHORT = Row("CIFAR100", None, 1)  # of 3,000 steps


@pytest.fixture(autouse=True)
def planned_once(monkeypatch):
    """The plan takes a second; it depends on configs/ alone."""
    monkeypatch.setattr(report, "planned_rows", lambda: PLANNED)


def make_run(folder, *, row=ROW, steps=None, records=(), evaluations=(), **changes):
    """A finished run of a row, with these settings changed."""
    how = {"res": 32, "experts": EXPERTS, "environment": [CALL]}
    config = {**asdict(row_options(row)), **how, **changes}
    steps = config["Iteration"] if steps is None else steps
    made_runs.write_run(folder, [*made_runs.steps([1] * steps, [1] * steps), *records], **config)
    if evaluations:
        (folder / "eval.json").write_text(json.dumps(list(evaluations)))
    return folder


def evaluation(*accs, set="raw", tag="best", model="ConvNet", epochs=1000, **others):
    prefix = "ema_" if set == "ema" else ""
    return {
        "distilled": f"distilled_{prefix}{tag}.pt",
        "trained_on": f"distilled {set}",
        "model": model,
        "epochs": epochs,
        "accs": list(accs),
        "acc_mean": sum(accs) / len(accs),
        "acc_std": 0.0,
        "seed": 0,
        "environment": CALL | {"command": "python eval.py --distilled x"},
        **others,
    }


logged = partial(made_runs.evaluation, model="ConvNetD3")


def read_run(folder):
    return with_evaluations(runs.read_run(folder))


def read_runs(paths):
    return runs.read_runs(paths, with_evaluations)


def lines_of(folder, table, **wanted):
    """The lines of a table, made from the runs in `folder`, at a place or of a method."""
    found, problems = read_runs([folder])
    assert not problems
    lines = table_lines(table, group_runs(found), PUBLISHED, PLANNED)
    return [
        line
        for line in lines
        if all(getattr(line, k, getattr(line.place, k, None)) == v for k, v in wanted.items())
    ]


@pytest.fixture(scope="module")
def row_run(tmp_path_factory):
    """The CIFAR-10 IPC 10 row to the letter, evaluated on all architectures, raw and EMA."""
    folder = tmp_path_factory.mktemp("row")
    five = (0.66, 0.67, 0.68, 0.69, 0.70)
    evaluations = [
        evaluation(*(acc - 0.1 * n for acc in five), model=model, set=set)
        for n, model in enumerate(ARCHITECTURES)
        for set in ("raw", "ema")
    ]
    random = evaluation(0.3, 0.4, trained_on="random real")
    make_run(folder / "run", evaluations=[*evaluations, random])
    return folder


# Published figures and rows


def test_published_figures_are_those_to_measure_against():
    """ConvNet at IPC 1, 10 and 50, as the project's notes on the field have them."""
    known = {
        "MTT": {"CIFAR10": (46.2, 65.4, 71.6), "CIFAR100": (24.3, 39.7, 47.7), "Tiny": (8.8, 23.2)},
        "FTD": {
            "CIFAR10": (46.8, 66.6, 73.8),
            "CIFAR100": (25.2, 43.4, 50.7),
            "Tiny": (10.4, 24.5),
        },
        "ATT": {
            "CIFAR10": (48.3, 67.7, 74.5),
            "CIFAR100": (26.1, 44.2, 51.2),
            "Tiny": (11.0, 25.8),
        },
        "Full dataset": {"CIFAR10": (84.8,), "CIFAR100": (56.2,), "Tiny": (37.6,)},
    }
    for method, figures in known.items():
        for dataset, means in figures.items():
            found = [
                figure.mean
                for figure in PUBLISHED
                if (figure.place.table, figure.method, figure.place.dataset) == (2, method, dataset)
            ]
            assert tuple(found) == means


def test_published_figures_are_complete_and_plausible():
    places = [(figure.place, figure.method) for figure in PUBLISHED]
    assert len(places) == len(set(places)) == 124
    assert {table: sum(p.table == table for p, _ in places) for table in TABLES} == {
        1: 4 + 4 + 3 * 8,
        2: 3 + 1 + 5 + 6 + 8 + 6 + 5 + 8 + 6 + 8 + 8,
        3: 7 * 4,
    }
    for figure in PUBLISHED:
        assert 1 < figure.mean < 90
        assert figure.std is None or 0 < figure.std < 5
    missing = [(f.method, f.place.title) for f in PUBLISHED if f.std is None]
    assert missing == [("ATT", "CIFAR10, IPC 1"), ("ATT", "imagemeow, IPC 1")]


def test_table_1_and_2_agree_on_att():
    att = {figure.place: figure for figure in PUBLISHED if figure.method == "ATT"}
    for place, figure in att.items():
        if place.table == 1 and place.network == "ConvNetD3":
            twin = next(
                f for p, f in att.items() if p.table == 2 and p.title == f"CIFAR10, IPC {place.ipc}"
            )
            assert (figure.mean, figure.std) == (twin.mean, twin.std)


def test_improvements_are_those_of_the_text():
    """Section 4.2 and 4.3 state them, so they check what the scan has garbled."""
    by = {(f.method, f.place.title): f.mean for f in PUBLISHED}
    said = {
        "ResNet18, IPC 10": 1.3,
        "AlexNet, IPC 10": 7.7,
        "VGG11, IPC 10": 7.2,
        "VGG11, IPC 50": 3.3,
        "AlexNet, IPC 50": 6.2,
        "imagemeow, IPC 10": 2.2,
        "imagenette, IPC 10": 1.6,
        "imagewoof, IPC 10": 1.2,
        "imagefruit, IPC 10": 1.0,
        "Tiny, IPC 10": 1.3,
        "Tiny, IPC 1": 0.6,
        "CIFAR10, IPC 1": 1.5,
        "CIFAR10, IPC 10": 1.1,
    }
    for title, points in said.items():
        assert by["ATT", title] - by["FTD", title] == pytest.approx(points), title


@pytest.mark.parametrize("row", list(PLANNED), ids=lambda row: row.name)
def test_every_row_resolves_to_the_method_of_its_name_and_says_its_source(row):
    options = PLANNED[row].options
    assert (options.dataset, options.ipc) == (row.dataset, row.ipc)
    assert method_name(options) == (row.method or "att").upper()
    assert PLANNED[row].hours > 0 and PLANNED[row].expert_hours > 0
    assert options.starts.end > options.starts.first
    if row.method:
        source = row.yaml.read_text().splitlines()[0]
        assert source.startswith(f"# {row.method.upper()}: github.com/") or "github.com" in source


def test_ftd_rows_are_those_of_the_notes():
    options = [row_options(Row(name, None, 10, "ftd")) for name in ("CIFAR10", "CIFAR100")]
    rates = [(o.lr_img, o.lr_lr, o.lr_teacher, o.syn_steps, o.max_start_epoch) for o in options]
    assert rates == [(100, 1e-5, 1e-3, 30, 20), (1000, 1e-5, 1e-2, 20, 40)]
    assert all(o.flat and o.zca and o.ema_decay == 0.9995 for o in options)
    assert all(o.length == "fixed" and o.Iteration == 5000 for o in options)


def test_every_yaml_is_a_row_or_of_experts():
    files = {path for path in CONFIGS.glob("*/ipc*.yaml") if path.parent.name != "digits"}
    assert {row.yaml.resolve() for row in PLANNED} == files


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "ATT"),
        ({"length": "fixed"}, "MTT"),
        ({"length": "fixed", "flat": True}, "FTD"),
        ({"length": "fixed", "prune_threshold": 0.1}, "PP"),
        ({"length": "fixed", "gradient": "tesla"}, "TESLA"),
        ({"length": "fixed", "start_epochs": [0, 4]}, "DATM"),
        ({"length": "fixed", "start_epochs": [0, 4], "flat": True}, "DATM"),
        ({"prune_threshold": 0.1}, "ATT + PP"),
        ({"flat": True}, "ATT + FTD"),
        ({"gradient": "tesla", "start_epochs": [2, 4]}, "ATT + DATM + TESLA"),
        ({"length": "halfway"}, "halfway"),
        ({"length": "halfway", "flat": True}, "halfway + FTD"),
    ],
)
def test_methods_are_named_after_their_settings(changes, name):
    assert method_name(DistillOptions(**changes)) == name


# The tables


def test_a_run_of_the_row_stands_in_all_its_places(row_run):
    networks = ("ConvNetD3", "ResNet18", "VGG11", "AlexNet")
    lines = lines_of(row_run, 1, ipc=10, method="ATT")
    for n, (line, network) in enumerate(zip(lines, networks, strict=True)):
        assert line.place.network == network
        assert line.differences == ()
        score = Score.over(line.measured("raw"))
        assert (score.n, score.of) == (5, "networks")
        assert (score.mean, score.std) == pytest.approx((68 - 10 * n, 2**0.5))
    (line,) = lines_of(row_run, 2, dataset="CIFAR10", ipc=10, method="ATT")
    assert line.difference("raw") == pytest.approx(68 - 67.7)
    assert line.difference("ema") == pytest.approx(68 - 67.7)


def test_what_was_not_run_has_no_group_and_a_cost(row_run):
    for line in lines_of(row_run, 2, ipc=1):
        assert line.group is None
        assert line.planned.hours > 0.5
        assert not_run(line).startswith("not run: ")
    (line,) = lines_of(row_run, 1, network="ConvNetD3", ipc=50, method="ATT")
    assert line.published.mean == 74.5
    assert line.planned.hours > 100  # a million steps


def test_a_row_that_is_evaluated_on_its_own_network_only(tmp_path):
    five = (0.6, 0.6, 0.6, 0.6, 0.6)
    make_run(tmp_path / "r", evaluations=[evaluation(*five)])
    (line,) = lines_of(tmp_path, 1, network="VGG11", ipc=10, method="ATT")
    assert line.group and not line.is_evaluated
    assert table_row(line)[3] == "not evaluated"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"experts": {"number": 4, "epochs": 50}}, "4 experts instead of 100"),
        ({"experts": {"number": 100, "epochs": 22}}, "experts of 22 epochs instead of 50"),
        (
            {"experts": {**EXPERTS, "lr_teacher": 0.1}},
            "experts' lr_teacher 0.1 instead of 0.01",
        ),
        ({"experts": None}, "experts that are not on record"),
        ({"Iteration": 150}, "Iteration 150 instead of 3000"),
        ({"lr_img": 100.0}, "lr_img 100.0 instead of 500.0"),
        ({"distance": "l1"}, "distance l1 instead of l2"),
        ({"val_fraction": 0.1}, "val_fraction 0.1 instead of 0.0"),
        ({"records": [{"kind": "rewind", "iteration": 3}]}, "went back to half a rate 1 times"),
        (
            {"steps": 7, "records": [{"kind": "diverged", "iteration": 7}]},
            "diverged at iteration 7",
        ),
    ],
)
def test_a_run_that_is_not_the_row_never_passes_as_it(tmp_path, changes, difference):
    make_run(tmp_path / "r", row=SHORT, evaluations=[evaluation(*[0.6] * 5)], **changes)
    bare, line = lines_of(tmp_path, 2, dataset="CIFAR100", ipc=1, method="ATT")
    assert bare.group is None
    assert line.differences == (difference,)
    assert table_row(line)[3] == "60.00 ± 0.00 †"


def test_a_short_evaluation_is_a_difference_too(tmp_path):
    make_run(tmp_path / "r", row=SHORT, evaluations=[evaluation(0.6, 0.7, epochs=300)])
    _, line = lines_of(tmp_path, 2, dataset="CIFAR100", ipc=1, method="ATT")
    said = "evaluated by 2 networks of 300 epochs instead of 5 of 1000"
    assert line.differences == (said,)


def test_what_does_not_alter_a_result_is_no_difference(tmp_path):
    make_run(
        tmp_path / "r",
        row=SHORT,
        evaluations=[evaluation(*[0.6] * 5)],
        model="ConvNet",
        run_name="mine",
        buffer_path="elsewhere",
        eval_it=7,
        seed=11,
        select="last",
    )
    (line,) = lines_of(tmp_path, 2, dataset="CIFAR100", ipc=1, method="ATT")
    assert line.differences == ()
    assert table_row(line)[-2] == "last"


def test_a_rival_stands_beside_its_own_figure(tmp_path):
    mtt = Row("CIFAR10", None, 10, "mtt")
    make_run(tmp_path / "r", row=mtt, evaluations=[evaluation(*[0.65] * 5)])
    (line,) = lines_of(tmp_path, 2, dataset="CIFAR10", ipc=10, method="MTT")
    assert line.differences == ()
    assert line.difference("raw") == pytest.approx(65 - 65.4)


def test_a_method_with_a_figure_but_without_a_row(tmp_path):
    changes = {"length": "fixed", "prune_threshold": 0.1, "Iteration": 3}
    make_run(tmp_path / "r", evaluations=[evaluation(*[0.65] * 5)], **changes)
    (line,) = lines_of(tmp_path, 2, dataset="CIFAR10", ipc=10, method="PP")
    assert line.published.mean == 65.5
    assert line.differences == ("there is no row of published settings here",)


def test_a_subset_of_imagenet_stands_in_its_place(tmp_path):
    row = Row("ImageNet", "imagewoof", 1)
    accs = [0.31] * 5
    make_run(tmp_path / "r", row=row, res=128, evaluations=[evaluation(*accs, model="ConvNetD5")])
    (line,) = lines_of(tmp_path, 3, subset="imagewoof", ipc=1, method="ATT")
    assert line.differences == ()
    assert line.difference("raw") == pytest.approx(31 - 31.2)
    (other,) = lines_of(tmp_path, 3, subset="imagenette", ipc=1, method="ATT")
    assert other.group is None


# Which evaluation counts


def measured(folder, trained_on="distilled raw", network="ConvNetD3"):
    return read_run(folder).measured[trained_on, network]


def test_the_chosen_iteration_counts_before_the_last_and_any_other(tmp_path):
    entries = [
        evaluation(0.5),
        evaluation(0.6, tag="last"),
        evaluation(0.7, tag="100", epochs=2000),
    ]
    for number, order in enumerate((entries, entries[::-1])):
        found = measured(make_run(tmp_path / f"{number}", Iteration=3, evaluations=order))
        assert (found.accuracies.mean, found.chosen_by) == (0.5, "test")
    found = measured(make_run(tmp_path / "last", Iteration=3, evaluations=entries[1:]))
    assert (found.accuracies.mean, found.chosen_by) == (0.6, "last")
    found = measured(make_run(tmp_path / "hundred", Iteration=3, evaluations=entries[2:]))
    assert found.chosen_by == "iteration 100"


def test_what_counts_is_augmented_alike_then_the_longest_then_the_most_then_the_latest(tmp_path):
    entries = [
        evaluation(0.5, 0.5),
        evaluation(0.6, 0.6),
        evaluation(0.7, model="ConvNetD3"),
        evaluation(0.8, 0.8, 0.8, epochs=3),
        evaluation(0.9, 0.9, dsa=None),
    ]
    assert (
        measured(make_run(tmp_path / "r", Iteration=3, evaluations=entries)).accuracies.mean == 0.6
    )


@pytest.mark.parametrize(("select", "mean"), [("test", 0.62), ("val", 0.5), ("last", 0.6)])
def test_without_eval_json_the_log_counts_as_the_run_chose(tmp_path, select, mean):
    records = [
        logged(0, 0.3, val_accs=[0.3]),
        logged(100, 0.62, val_accs=[0.4]),
        logged(200, 0.5, val_accs=[0.45]),
        logged(300, 0.6, val_accs=[0.41]),
        logged(300, 0.55, set="ema", val_accs=[0.7]),
    ]
    folder = make_run(tmp_path / "r", Iteration=3, records=records, select=select, val_fraction=0.1)
    assert measured(folder).accuracies.mean == mean
    assert measured(folder).chosen_by == select
    assert measured(folder, "distilled ema").accuracies.mean == 0.55


def test_other_networks_follow_the_iteration_that_the_own_one_chose(tmp_path):
    records = [
        logged(1, 0.7),
        logged(1, 0.2, model="VGG11"),
        logged(2, 0.6),
        logged(2, 0.3, model="VGG11"),
    ]
    folder = make_run(tmp_path / "r", Iteration=3, records=records)
    assert measured(folder, network="VGG11").accuracies.mean == 0.2


def test_eval_json_counts_before_the_log(tmp_path):
    records = [logged(3, 0.9), logged(3, 0.8, set="ema")]
    folder = make_run(tmp_path / "r", Iteration=3, records=records, evaluations=[evaluation(0.5)])
    assert measured(folder).accuracies.mean == 0.5
    assert measured(folder, "distilled ema").accuracies.mean == 0.8


def test_an_evaluation_of_the_initial_images_is_none_of_the_run(tmp_path):
    assert read_run(make_run(tmp_path / "r", Iteration=3, records=[logged(0, 0.9)])).measured == {}


# All runs


def test_one_network_alone_has_no_spread():
    assert str(Score(60.0, 0.0, 1, "networks")) == "60.00"
    assert str(Score(60.0, 0.0, 2, "networks")) == "60.00 ± 0.00"
    assert str(Accuracies((0.6,))).split() == ["60.00%", "(n=1)"]


def test_seeds_share_a_line_with_the_spread_of_their_means(tmp_path):
    for seed, accs in ((0, (0.5, 0.6)), (1, (0.6, 0.7)), (2, (0.7, 0.8))):
        make_run(
            tmp_path / f"{seed}",
            seed=seed,
            run_name=f"{seed}",
            Iteration=3,
            evaluations=[evaluation(*accs)],
        )
    found, problems = read_runs([tmp_path])
    (line,) = run_lines(group_runs(found))
    assert not problems
    assert line.seeds == (0, 1, 2)
    score = line.scores["ConvNetD3"]
    assert (score.n, score.of, score.mean) == (3, "seeds", pytest.approx(65))
    assert score.std == pytest.approx((200 / 3) ** 0.5)


def test_settings_that_differ_make_lines_of_their_own_that_say_so(tmp_path):
    for n, lr_img in enumerate((1.0, 3.0)):
        changes = {"lr_img": lr_img, "Iteration": 3, "evaluations": [evaluation(0.5)]}
        make_run(tmp_path / f"{n}", **changes)
    make_run(
        tmp_path / "ipc50", row=Row("CIFAR10", None, 50), Iteration=3, evaluations=[evaluation(0.5)]
    )
    lines = run_lines(group_runs(read_runs([tmp_path])[0]))
    assert [line.columns["also"] for line in lines] == ["lr_img 1.0", "lr_img 3.0", ""]


def test_data_sets_never_share_a_line(tmp_path):
    for n, (dataset, res) in enumerate((("digits", 8), ("digits", 16), ("CIFAR100", 32))):
        changes = {"dataset": dataset, "res": res, "ipc": 1, "Iteration": 3}
        make_run(tmp_path / f"{n}", evaluations=[evaluation(0.5)], **changes)
    lines = run_lines(group_runs(read_runs([tmp_path])[0]))
    assert [line.dataset for line in lines] == ["CIFAR100", "digits 16x16", "digits 8x8"]


def test_runs_that_diverged_are_counted(tmp_path):
    records = [logged(100, 0.4), {"kind": "diverged", "iteration": 2, "rate": "lr_img"}]
    make_run(tmp_path / "0", Iteration=3, records=[logged(100, 0.5)])
    make_run(tmp_path / "1", Iteration=3, seed=1, steps=2, records=records)
    (line,) = run_lines(group_runs(read_runs([tmp_path])[0]))
    assert line.columns["also"] == "1 of 2 diverged"
    assert line.scores["ConvNetD3"].mean == pytest.approx(45)


def test_a_run_that_went_on_after_it_diverged_has_not(tmp_path):
    records = [{"kind": "diverged", "iteration": 2}, {"kind": "step", "iteration": 2}]
    assert (
        read_run(make_run(tmp_path / "r", Iteration=3, steps=2, records=records)).diverged is None
    )


def test_real_images_have_lines_each_seed_once(tmp_path):
    for n, lr_img in enumerate((1.0, 3.0)):
        entries = [
            evaluation(0.2, 0.4, trained_on="random real"),
            evaluation(0.5, 0.5, trained_on="herding", seed=n),
            evaluation(0.9, trained_on="full"),
        ]
        make_run(tmp_path / f"{n}", lr_img=lr_img, Iteration=3, evaluations=entries)
    lines = {line.method: line for line in run_lines(group_runs(read_runs([tmp_path])[0]))}
    assert lines["random real"].scores["ConvNetD3"].count == "2 networks"
    assert lines["herding"].scores["ConvNetD3"].count == "2 seeds"
    assert (lines["random real"].ipc, lines["full"].ipc) == (10, None)


# Files


def written(out):
    text = (out / "results.md").read_text()
    with open(out / "results.csv", newline="") as file:
        return text, list(csv.DictReader(file))


def test_the_report_says_where_its_figures_come_from(row_run, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/fig1_digits.png").touch()
    assert report.main([str(row_run), "--out", str(tmp_path)]) == 0
    text, records = written(tmp_path)
    for part in (
        "python -m scripts.report",
        "[findings.md](findings.md)",
        "picks the iteration that is reported on the test set",
        "| CIFAR10, IPC 10 | ATT | 67.7 ± 0.6 | 68.00 ± 1.41 | +0.3 |",
        "not run: ",
        "python distill_att.py --ipc 10",
        "a GPU. python 3.11.7, torch 2.12.1. Commit abc123.",
        "![fig1_digits](figures/fig1_digits.png)",
        "random real",
    ):
        assert part in text
    assert "Left out" not in text
    row = [r for r in records if r["table"] == "2" and r["status"] == "run"]
    assert {(r["set"], r["mean"], r["difference"], r["chosen_by"]) for r in row} == {
        (name, "68.0000", "0.3000", "test") for name in ("raw", "ema")
    }
    ours = {r["method"] for r in records if r["status"] == "not run"}
    assert ours == {"ATT", "MTT", "FTD", "DATM", "TESLA"}
    assert sum(bool(r["paper_mean"]) for r in records) >= len(PUBLISHED)


def test_every_line_of_a_table_has_as_many_cells_as_its_head(row_run, tmp_path):
    assert report.main([str(row_run), "--out", str(tmp_path)]) == 0
    width = None
    for line in (tmp_path / "results.md").read_text().splitlines():
        cells = line.count("|") if line.startswith("|") else None
        assert None in (width, cells) or cells == width
        width = cells


def test_without_runs_the_report_has_figures_and_costs(tmp_path, capsys):
    assert report.main([str(tmp_path / "none"), "--out", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().err == f"left out: {tmp_path}/none: there is no run directory\n"
    text, records = written(tmp_path / "docs")
    assert "74.5 ± 0.4" in text and "not run: " in text and "All runs" not in text
    assert {r["status"] for r in records} == {"not run", "published"}


def break_config(folder):
    (folder / "config.yaml").write_text("model: [")


def break_evaluations(folder):
    (folder / "eval.json").write_text('[{"trained_on": "distilled raw"}]')


def lose_config(folder):
    (folder / "config.yaml").unlink()


def lose_log(folder):
    (folder / "metrics.jsonl").unlink()


def unreadable_log(folder):
    lose_log(folder)
    (folder / "metrics.jsonl").mkdir()


def binary_config(folder):
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00\x80")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (break_config, ["config.yaml", "not valid YAML"]),
        (binary_config, ["config.yaml", "not valid YAML"]),
        (break_evaluations, ["eval.json", "cannot be read"]),
        (lose_config, ["config.yaml", "No such file"]),
        (lose_log, ["unfinished", "0 of 3"]),
        (unreadable_log, ["metrics.jsonl", "Is a directory"]),
        ({"steps": 2}, ["unfinished", "2 of 3 steps"]),
        ({"drop": ["length"]}, ["another version", "length"]),
        ({"learning": 3}, ["config.yaml", "unknown key 'learning'"]),
        ({"length": "longest"}, ["config.yaml: length", "'longest'", "fixed"]),
        ({"seed": 0, "run_name": "twin"}, ["settings and seed of"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_used_is_one_line_and_the_rest_is_covered(tmp_path, capsys, damage, parts):
    common = {"Iteration": 3, "evaluations": [evaluation(0.5)]}
    make_run(tmp_path / "runs/a_good", **common)
    changes = damage if isinstance(damage, dict) else {"seed": 1}
    if "run_name" not in changes:
        changes = {"seed": 1, **changes}
    bad = make_run(tmp_path / "runs/bad", **{**common, **changes})
    if callable(damage):
        damage(bad)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    text, _ = written(tmp_path)
    (said,) = text[text.index("## Left out") :].splitlines()[2:]
    assert line == f"left out: {said.removeprefix('- ')}"
    assert str(bad) in line
    for part in parts:
        assert part in line
    assert "| CIFAR10 | 10 | ATT |" in text


def test_a_run_without_an_evaluation_is_named(tmp_path, capsys):
    for seed in range(3):
        make_run(tmp_path / f"r{seed}", seed=seed, Iteration=3)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "docs")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "r0 and 2 of other seeds: not evaluated" in line


def test_runs_of_a_smoke_run_are_not_results(tmp_path):
    make_run(tmp_path / "smoke/now/r", Iteration=3, evaluations=[evaluation(0.5)])
    assert read_runs([tmp_path])[0] == []
    assert len(read_runs([tmp_path / "smoke"])[0]) == 1


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    folder = make_run(tmp_path / "r", Iteration=3, evaluations=[evaluation(0.5)])
    found, problems = read_runs([tmp_path, folder])
    assert (len(found), problems) == (1, [])


def test_runs_of_earlier_versions_are_read(tmp_path):
    """Without the settings, records and entries that came later; one call instead of a list."""
    later = ["flat", "val_fraction", "select", "gradient", "prune_threshold", "start_epochs"]
    later += ["current_max_start_epoch", "expansion_end_epoch", "log_distances", "trajectories"]
    entry = evaluation(0.5, 0.6)
    for name in ("seed", "environment"):
        del entry[name]
    folder = make_run(tmp_path / "r", Iteration=3, drop=later, evaluations=[entry])
    content = yaml.safe_load((folder / "config.yaml").read_text())
    del content["experts"]
    content["environment"] = content["environment"][0]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    run = read_run(folder)
    assert (run.method, run.experts, run.calls) == ("ATT", None, [CALL])
    assert run.measured["distilled raw", "ConvNetD3"].accuracies.accs == (0.5, 0.6)


def test_a_real_run_is_read(finished, tmp_path):
    """What distill_att.py writes today."""
    folder = tmp_path / "digits"
    shutil.copytree(finished, folder)
    run = read_run(folder)
    assert (run.options.dataset, run.method, run.diverged) == ("digits", "ATT", None)
    assert run.experts["number"] == 2
    assert {network for _, network in run.measured} == {run.model}
    assert {name for name, _ in run.measured} == {"distilled raw", "distilled ema"}
    assert report.main([str(folder), "--out", str(tmp_path / "docs")]) == 0
    assert "| digits 8x8 | 1 | ATT |" in (tmp_path / "docs/results.md").read_text()


def test_bad_flags_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--nix"):
        report.main(["--nix"])
