"""scripts/report: published figures, run directories with known answers, and bad ones."""

import csv
import json
import shutil
from dataclasses import asdict
from functools import partial
from operator import attrgetter

import made_runs
import pytest
import yaml

from scripts.plan.cells import Row, row_options, table_rows
from scripts.report import __main__ as report
from scripts.report.markdown import table_section
from scripts.report.records import (
    ALL_RUNS,
    PLACE,
    group_runs,
    make_records,
    measured_in,
    planned_rows,
    read_published,
)
from scripts.results import runs
from scripts.results.evaluations import measured
from scripts.results.runs import title
from utils.config.resolve import CONFIGS
from utils.core.errors import UserError
from utils.measure.protocol import Accuracies, mean_and_std
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
FIVE = (0.66, 0.67, 0.68, 0.69, 0.70)
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
        "num_eval": len(accs),
        "accs": list(accs),
        "acc_mean": sum(accs) / len(accs),
        "acc_std": 0.0,
        "seed": 0,
        "environment": CALL | {"command": "python eval.py --distilled x"},
        **others,
    }


logged = partial(made_runs.evaluation, model="ConvNetD3")


def read_runs(*paths):
    return runs.read_runs(paths, attrgetter("evaluations"))


def records_of(folder, **wanted):
    """The records of the report on the runs in `folder` that have the values `wanted`."""
    found, problems = read_runs(folder)
    assert not problems
    groups = group_runs(found)
    return at(make_records(groups, measured_in(groups), PUBLISHED, PLANNED), **wanted)


def at(frame, **wanted):
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    return frame


def listed(folder, **wanted):
    return records_of(folder, table=ALL_RUNS, **wanted)


def also(folder):
    """What the list of all runs says of each line beyond its columns."""
    return [settings["also"] for settings in listed(folder)["settings"]]


def cells(records):
    """The cells of the lines that records of one table become in results.md."""
    text = table_section(records["table"].iloc[0], records, PUBLISHED).partition("Here:")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture(scope="module")
def row_run(tmp_path_factory):
    """The CIFAR-10 IPC 10 row to the letter, evaluated on all architectures, raw and EMA."""
    folder = tmp_path_factory.mktemp("row")
    evaluations = [
        evaluation(*(acc - 0.1 * n for acc in FIVE), model=model, set=set)
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
            found = at(PUBLISHED, table=2, method=method, dataset=dataset)
            assert tuple(found["paper_mean"]) == means


def test_published_figures_are_complete_and_plausible():
    assert len(PUBLISHED) == len(PUBLISHED[[*PLACE, "method"]].drop_duplicates()) == 124
    assert PUBLISHED["table"].value_counts().to_dict() == {
        1: 4 + 4 + 3 * 8,
        2: 3 + 1 + 5 + 6 + 8 + 6 + 5 + 8 + 6 + 8 + 8,
        3: 7 * 4,
    }
    unread = PUBLISHED["paper_std"].isna()
    assert PUBLISHED["paper_mean"].between(1, 90, inclusive="neither").all()
    assert PUBLISHED["paper_std"][~unread].between(0, 5, inclusive="neither").all()
    assert PUBLISHED[unread][["method", "dataset", "subset", "ipc"]].to_numpy().tolist() == [
        ["ATT", "CIFAR10", "", 1],
        ["ATT", "ImageNet", "imagemeow", 1],
    ]


def test_table_1_and_2_agree_on_att():
    att = at(PUBLISHED, method="ATT", dataset="CIFAR10", network="ConvNetD3")
    one, two = (at(att, table=table).set_index("ipc") for table in (1, 2))
    figures = ["paper_mean", "paper_std"]
    assert one[figures].equals(two.loc[one.index, figures])


def test_improvements_are_those_of_the_text():
    """Section 4.2 and 4.3 state them, so they check what the scan has garbled."""
    by = {
        (each.method, each.subset or each.dataset, each.network, each.ipc): each.paper_mean
        for each in PUBLISHED.itertuples()
        if each.table != 2 or each.ipc
    }
    said = {
        ("CIFAR10", "ResNet18", 10): 1.3,
        ("CIFAR10", "AlexNet", 10): 7.7,
        ("CIFAR10", "VGG11", 10): 7.2,
        ("CIFAR10", "VGG11", 50): 3.3,
        ("CIFAR10", "AlexNet", 50): 6.2,
        ("imagemeow", "ConvNetD5", 10): 2.2,
        ("imagenette", "ConvNetD5", 10): 1.6,
        ("imagewoof", "ConvNetD5", 10): 1.2,
        ("imagefruit", "ConvNetD5", 10): 1.0,
        ("Tiny", "ConvNetD4", 10): 1.3,
        ("Tiny", "ConvNetD4", 1): 0.6,
        ("CIFAR10", "ConvNetD3", 1): 1.5,
        ("CIFAR10", "ConvNetD3", 10): 1.1,
    }
    for place, points in said.items():
        assert by["ATT", *place] - by["FTD", *place] == pytest.approx(points), place


@pytest.mark.parametrize("row", table_rows(rivals=True), ids=lambda row: row.name)
def test_every_row_resolves_to_the_method_of_its_name_and_says_its_source(row):
    method = (row.method or "att").upper()
    where = {"dataset": row.dataset, "subset": row.subset or "", "ipc": row.ipc, "method": method}
    (planned,) = at(PLANNED, **where).to_dict("records")
    options = planned["options"]
    assert (options.dataset, options.ipc) == (row.dataset, row.ipc)
    assert title(vars(options)) == method
    assert planned["gpu_hours"] > 0 and planned["expert_gpu_hours"] > 0
    assert options.starts.end > options.starts.first
    if row.method:
        source = row.yaml.read_text().splitlines()[0]
        assert source.startswith(f"# {method}: github.com/") or "github.com" in source


def test_ftd_rows_are_those_of_the_notes():
    options = [row_options(Row(name, None, 10, "ftd")) for name in ("CIFAR10", "CIFAR100")]
    rates = [(o.lr_img, o.lr_lr, o.lr_teacher, o.syn_steps, o.max_start_epoch) for o in options]
    assert rates == [(100, 1e-5, 1e-3, 30, 20), (1000, 1e-5, 1e-2, 20, 40)]
    assert all(o.flat and o.zca and o.ema_decay == 0.9995 for o in options)
    assert all(o.length == "fixed" and o.Iteration == 5000 for o in options)


def test_every_yaml_is_a_row_or_of_experts():
    files = {path for path in CONFIGS.glob("*/ipc*.yaml") if path.parent.name != "digits"}
    assert {row.yaml.resolve() for row in table_rows(rivals=True)} == files


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
    assert title(asdict(DistillOptions(**changes))) == name


# The tables


def test_a_run_of_the_row_stands_in_all_its_places(row_run):
    networks = ("ConvNetD3", "ResNet18", "VGG11", "AlexNet")
    of_row = {"dataset": "CIFAR10", "ipc": 10, "method": "ATT", "status": "run", "set": "raw"}
    one = records_of(row_run, table=1, **of_row)
    assert tuple(one["network"]) == networks
    assert (set(one["n"]), set(one["of"]), set(one["differences"])) == ({5}, {"networks"}, {""})
    assert one["mean"].tolist() == pytest.approx([68, 58, 48, 38])
    assert one["std"].tolist() == pytest.approx([2**0.5] * 4)
    for name in ("raw", "ema"):
        (two,) = records_of(row_run, table=2, **of_row | {"set": name})["difference"]
        assert two == pytest.approx(68 - 67.7)


def test_what_was_not_run_has_no_runs_and_a_cost(row_run):
    lines = records_of(row_run, table=2, ipc=1, status="not run")
    assert len(lines) > 5 and lines["runs"].isna().all()
    assert (lines["gpu_hours"] > 0.5).all()
    assert all(line[3].startswith("not run: ") for line in cells(lines))
    wanted = {"table": 1, "network": "ConvNetD3", "ipc": 50, "method": "ATT"}
    (line,) = records_of(row_run, **wanted).to_dict("records")
    assert line["paper_mean"] == 74.5
    assert line["gpu_hours"] > 100  # a million steps


def test_a_row_that_is_evaluated_on_its_own_network_only(tmp_path):
    make_run(tmp_path / "r", evaluations=[evaluation(*FIVE)])
    line = records_of(tmp_path, table=1, network="VGG11", ipc=10, method="ATT")
    ((_, _, _, raw, *_, where),) = cells(line)
    assert (raw, where) == ("not evaluated", f"`{tmp_path / 'r'}`")


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
    lines = records_of(tmp_path, table=2, dataset="CIFAR100", ipc=1, method="ATT")
    assert lines["status"].tolist() == ["not run", "differs"]
    assert lines["differences"].iloc[1] == difference
    assert cells(lines)[1][3] == "60.00 ± 0.00 †"


def test_a_short_evaluation_is_a_difference_too(tmp_path):
    make_run(tmp_path / "r", row=SHORT, evaluations=[evaluation(0.6, 0.7, epochs=300)])
    (said,) = records_of(tmp_path, table=2, dataset="CIFAR100", status="differs")["differences"]
    assert said == "evaluated by 2 networks of 300 epochs instead of 5 of 1000"


def test_what_does_not_alter_a_result_is_no_difference(tmp_path):
    free = {"run_name": "mine", "buffer_path": "elsewhere", "eval_it": 7, "seed": 11}
    free |= {"select": "last", "model": "ConvNet"}
    make_run(tmp_path / "r", row=SHORT, evaluations=[evaluation(*[0.6] * 5)], **free)
    line = records_of(tmp_path, table=2, dataset="CIFAR100", ipc=1, method="ATT")
    assert line["differences"].tolist() == [""]
    assert cells(line)[0][-2] == "last"


@pytest.mark.parametrize(
    ("row", "changes", "network", "wanted", "difference"),
    [
        (Row("CIFAR10", None, 10, "mtt"), {}, "ConvNet", {"method": "MTT"}, 65 - 65.4),
        (Row("ImageNet", "imagewoof", 1), {"res": 128}, "ConvNetD5", {"subset": "imagewoof"}, 33.8),
    ],
)
def test_rivals_and_subsets_stand_in_their_own_places(
    tmp_path, row, changes, network, wanted, difference
):
    make_run(
        tmp_path / "r", row=row, evaluations=[evaluation(*[0.65] * 5, model=network)], **changes
    )
    lines = records_of(tmp_path, dataset=row.dataset, ipc=row.ipc, status="run")
    for line in at(lines, table=3 if row.subset else 2).to_dict("records"):
        assert line["differences"] == ""
        assert line["difference"] == pytest.approx(difference)
        assert wanted.items() <= line.items()


def test_a_method_with_a_figure_but_without_a_row(tmp_path):
    changes = {"length": "fixed", "prune_threshold": 0.1, "Iteration": 3}
    make_run(tmp_path / "r", evaluations=[evaluation(*[0.65] * 5)], **changes)
    (line,) = records_of(tmp_path, table=2, method="PP", status="differs").to_dict("records")
    assert (line["dataset"], line["ipc"], line["paper_mean"]) == ("CIFAR10", 10, 65.5)
    assert line["differences"] == "there is no row of published settings here"


def test_a_published_figure_comes_once_also_where_runs_of_it_are_not_evaluated(tmp_path):
    changes = {"length": "fixed", "prune_threshold": 0.1, "Iteration": 3}
    make_run(tmp_path / "r", **changes)
    found = records_of(tmp_path, table=2, dataset="CIFAR10", ipc=10, method="PP")
    assert found["status"].tolist() == ["published"]


# Which evaluation counts


def what_counts(folder, trained_on="distilled raw", network="ConvNetD3"):
    """The mean, and how the iteration was chosen."""
    found = at(measured([runs.read_run(folder)]), trained_on=trained_on, network=network)
    ((mean, chosen_by),) = found[["mean", "chosen_by"]].itertuples(index=False)
    return pytest.approx(mean), chosen_by


def test_the_chosen_iteration_counts_before_the_last_and_any_other(tmp_path):
    entries = [
        evaluation(0.5),
        evaluation(0.6, tag="last"),
        evaluation(0.7, tag="100", epochs=2000),
    ]
    for name, order, expected in (
        ("all", entries, (50, "test")),
        ("reversed", entries[::-1], (50, "test")),
        ("last", entries[1:], (60, "last")),
        ("hundred", entries[2:], (70, "iteration 100")),
    ):
        assert what_counts(make_run(tmp_path / name, Iteration=3, evaluations=order)) == expected


def test_what_counts_is_augmented_alike_then_the_longest_then_the_most_then_the_latest(tmp_path):
    entries = [
        evaluation(0.5, 0.5),
        evaluation(0.6, 0.6),
        evaluation(0.7, model="ConvNetD3"),
        evaluation(0.8, 0.8, 0.8, epochs=3),
        evaluation(0.9, 0.9, dsa=None),
    ]
    assert what_counts(make_run(tmp_path / "r", Iteration=3, evaluations=entries))[0] == 60


@pytest.mark.parametrize(("select", "mean"), [("test", 62), ("val", 50), ("last", 60)])
def test_without_eval_json_the_log_counts_as_the_run_chose(tmp_path, select, mean):
    records = [
        logged(0, 0.3, val_accs=[0.3]),
        logged(100, 0.62, val_accs=[0.4]),
        logged(200, 0.5, val_accs=[0.45]),
        logged(300, 0.6, val_accs=[0.41]),
        logged(300, 0.55, set="ema", val_accs=[0.7]),
    ]
    folder = make_run(tmp_path / "r", Iteration=3, records=records, select=select, val_fraction=0.1)
    assert what_counts(folder) == (mean, select)
    assert what_counts(folder, "distilled ema") == (55, select)


def test_other_networks_follow_the_iteration_that_the_own_one_chose(tmp_path):
    records = [
        logged(1, 0.7),
        logged(1, 0.2, model="VGG11"),
        logged(2, 0.6),
        logged(2, 0.3, model="VGG11"),
    ]
    folder = make_run(tmp_path / "r", Iteration=3, records=records)
    assert what_counts(folder, network="VGG11")[0] == 20


def test_eval_json_counts_before_the_log(tmp_path):
    records = [logged(3, 0.9), logged(3, 0.8, set="ema")]
    folder = make_run(tmp_path / "r", Iteration=3, records=records, evaluations=[evaluation(0.5)])
    assert what_counts(folder)[0] == 50
    assert what_counts(folder, "distilled ema")[0] == 80


def test_an_evaluation_of_the_initial_images_is_none_of_the_run(tmp_path):
    folder = make_run(tmp_path / "r", Iteration=3, records=[logged(0, 0.9)])
    assert measured([runs.read_run(folder)]).empty


# All runs


def test_one_network_alone_has_no_spread():
    assert mean_and_std(60.0, 0.0, 1) == "60.00"
    assert mean_and_std(60.0, 0.0, 2) == "60.00 ± 0.00"
    assert str(Accuracies((0.6,))) == "60.00% (n=1)"
    assert str(Accuracies((0.06, 0.06))) == " 6.00% ± 0.00% (n=2)"


def test_seeds_share_a_line_with_the_spread_of_their_means(tmp_path):
    for seed, accs in ((0, (0.5, 0.6)), (1, (0.6, 0.7)), (2, (0.7, 0.8))):
        made = {"seed": seed, "run_name": f"{seed}", "evaluations": [evaluation(*accs)]}
        make_run(tmp_path / f"{seed}", Iteration=3, **made)
    (line,) = listed(tmp_path, network="ConvNetD3").to_dict("records")
    assert (line["seeds"], line["n"], line["of"]) == ("0 1 2", 3, "seeds")
    assert line["mean"] == pytest.approx(65)
    assert line["std"] == pytest.approx((200 / 3) ** 0.5)


def test_settings_that_differ_make_lines_of_their_own_that_say_so(tmp_path):
    common = {"Iteration": 3, "evaluations": [evaluation(0.5)]}
    for n, lr_img in enumerate((1.0, 3.0)):
        make_run(tmp_path / f"{n}", lr_img=lr_img, **common)
    make_run(tmp_path / "ipc50", row=Row("CIFAR10", None, 50), **common)
    assert also(tmp_path) == ["lr_img 1.0", "lr_img 3.0", ""]


def test_data_sets_never_share_a_line(tmp_path):
    for n, (dataset, res) in enumerate((("digits", 8), ("digits", 16), ("CIFAR100", 32))):
        changes = {"dataset": dataset, "res": res, "ipc": 1, "Iteration": 3}
        make_run(tmp_path / f"{n}", evaluations=[evaluation(0.5)], **changes)
    assert listed(tmp_path)["dataset"].tolist() == ["CIFAR100", "digits 16x16", "digits 8x8"]


def test_runs_that_diverged_are_counted(tmp_path):
    records = [logged(100, 0.4), {"kind": "diverged", "iteration": 2, "rate": "lr_img"}]
    make_run(tmp_path / "0", Iteration=3, records=[logged(100, 0.5)])
    make_run(tmp_path / "1", Iteration=3, seed=1, steps=2, records=records)
    assert also(tmp_path) == ["1 of 2 diverged"]
    assert listed(tmp_path)["mean"].tolist() == pytest.approx([45])


def test_a_run_that_went_on_after_it_diverged_has_not(tmp_path):
    records = [{"kind": "diverged", "iteration": 2}, {"kind": "step", "iteration": 2}]
    folder = make_run(tmp_path / "r", Iteration=3, steps=2, records=records)
    assert runs.read_run(folder).diverged is None


def test_real_images_have_lines_each_seed_once(tmp_path):
    for n, lr_img in enumerate((1.0, 3.0)):
        entries = [
            evaluation(0.2, 0.4, trained_on="random real"),
            evaluation(0.5, 0.5, trained_on="herding", seed=n),
            evaluation(0.9, trained_on="full"),
        ]
        make_run(tmp_path / f"{n}", lr_img=lr_img, Iteration=3, evaluations=entries)
    found = listed(tmp_path, network="ConvNetD3").set_index("method")
    assert found.loc["random real", ["ipc", "n", "of"]].tolist() == [10, 2, "networks"]
    assert found.loc["herding", ["ipc", "n", "of"]].tolist() == [10, 2, "seeds"]
    assert found.loc["full", ["ipc", "n", "of"]].tolist() == [0, 1, "networks"]


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
    assert "not evaluated" not in {record["status"] for record in records}
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
    assert read_runs(tmp_path)[0] == []
    assert len(read_runs(tmp_path / "smoke")[0]) == 1


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    folder = make_run(tmp_path / "r", Iteration=3, evaluations=[evaluation(0.5)])
    found, problems = read_runs(tmp_path, folder)
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
    run = runs.read_run(folder)
    assert (run.method, run.experts, run.environments) == ("ATT", None, [CALL])
    assert what_counts(folder)[0] == 55


def test_a_real_run_is_read(finished, tmp_path):
    """What distill_att.py writes today."""
    folder = tmp_path / "digits"
    shutil.copytree(finished, folder)
    run = runs.read_run(folder)
    assert (run.options.dataset, run.method, run.diverged) == ("digits", "ATT", None)
    assert run.experts["number"] == 2
    found = measured([run])
    assert set(found["network"]) == {run.model}
    assert set(found["trained_on"]) == {"distilled raw", "distilled ema"}
    assert report.main([str(folder), "--out", str(tmp_path / "docs")]) == 0
    assert "| digits 8x8 | 1 | ATT |" in (tmp_path / "docs/results.md").read_text()


def test_a_method_that_matches_no_trajectories_has_no_lengths_and_no_experts(tmp_path):
    """Its steps have a loss and no length; the columns of a trajectory stay empty."""
    step = {"kind": "step", "loss": 1.0, "seconds": 1.0}
    records = [step | {"iteration": iteration} for iteration in range(3)]
    folder = made_runs.write_run(tmp_path / "r", records, experts=None)
    (folder / "eval.json").write_text(json.dumps([evaluation(0.5, model="ConvNetD2")]))
    (shown,) = listed(tmp_path)["settings"]
    assert (shown["N_S"], shown["N_T"], shown["experts"]) == ("", "", "")
    assert shown["iterations"] == 3


def test_bad_flags_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--nix"):
        report.main(["--nix"])
