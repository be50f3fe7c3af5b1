"""scripts/report: the paper's figures, its tables beside made-up runs, and the files written."""

import csv
import re
from dataclasses import asdict
from functools import partial
from operator import attrgetter

import pytest
from made_runs import EXPERTS, entry, evaluation, steps_without_lengths, write_row, write_run

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
from scripts.results.runs import read_runs
from utils.config.resolve import CONFIGS
from utils.core.errors import UserError
from utils.measure.protocol import Accuracies, mean_and_std
from utils.methods.registry import METHODS, foreign_flags, title
from utils.options import DistillOptions

ARCHITECTURES = ("ConvNet", "ResNet18", "VGG11", "AlexNet")
FIVE = (0.66, 0.67, 0.68, 0.69, 0.70)
PUBLISHED, PLANNED = read_published(), planned_rows()
SHORT = Row("CIFAR100", None, 1)  # of 3,000 steps
logged = partial(evaluation, model="ConvNetD3")


@pytest.fixture(autouse=True)
def planned_once(monkeypatch):
    """The plan takes a second; it depends on configs/ alone."""
    monkeypatch.setattr(report, "planned_rows", lambda: PLANNED)


def records_of(folder, **wanted):
    """The records of the report on the runs in `folder` that have the values `wanted`."""
    found, problems = read_runs([folder], attrgetter("evaluations"))
    assert not problems
    groups = group_runs(found)
    return at(make_records(groups, measured_in(groups), PUBLISHED, PLANNED), **wanted)


def at(frame, **wanted):
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    return frame


def listed(folder, **wanted):
    return records_of(folder, table=ALL_RUNS, **wanted)


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
        entry(*(acc - 0.1 * n for acc in FIVE), model=model, set=set)
        for n, model in enumerate(ARCHITECTURES)
        for set in ("raw", "ema")
    ]
    random = entry(0.3, 0.4, trained_on="random real")
    write_row(folder / "run", evaluations=[*evaluations, random])
    return folder


# Published figures and rows


@pytest.mark.parametrize(
    ("dataset", "method", "means"),
    [
        ("CIFAR10", "MTT", [46.2, 65.4, 71.6]),
        ("CIFAR10", "FTD", [46.8, 66.6, 73.8]),
        ("CIFAR10", "ATT", [48.3, 67.7, 74.5]),
        ("CIFAR10", "Full dataset", [84.8]),
        ("CIFAR100", "MTT", [24.3, 39.7, 47.7]),
        ("CIFAR100", "FTD", [25.2, 43.4, 50.7]),
        ("CIFAR100", "ATT", [26.1, 44.2, 51.2]),
        ("CIFAR100", "Full dataset", [56.2]),
        ("Tiny", "MTT", [8.8, 23.2]),
        ("Tiny", "FTD", [10.4, 24.5]),
        ("Tiny", "ATT", [11.0, 25.8]),
        ("Tiny", "Full dataset", [37.6]),
    ],
)
def test_published_figures_are_those_to_measure_against(dataset, method, means):
    """ConvNet at IPC 1, 10 and 50, as the project's notes on the field have them."""
    assert at(PUBLISHED, table=2, method=method, dataset=dataset)["paper_mean"].tolist() == means


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


@pytest.mark.parametrize(
    ("name", "network", "ipc", "points"),
    [
        ("CIFAR10", "ResNet18", 10, 1.3),
        ("CIFAR10", "AlexNet", 10, 7.7),
        ("CIFAR10", "VGG11", 10, 7.2),
        ("CIFAR10", "VGG11", 50, 3.3),
        ("CIFAR10", "AlexNet", 50, 6.2),
        ("imagemeow", "ConvNetD5", 10, 2.2),
        ("imagenette", "ConvNetD5", 10, 1.6),
        ("imagewoof", "ConvNetD5", 10, 1.2),
        ("imagefruit", "ConvNetD5", 10, 1.0),
        ("Tiny", "ConvNetD4", 10, 1.3),
        ("Tiny", "ConvNetD4", 1, 0.6),
        ("CIFAR10", "ConvNetD3", 1, 1.5),
        ("CIFAR10", "ConvNetD3", 10, 1.1),
    ],
)
def test_improvements_are_those_of_the_text(name, network, ipc, points):
    """Section 4.2 and 4.3 state them, so they check what the scan has garbled."""
    place = at(PUBLISHED, network=network, ipc=ipc)
    place = place[(place["subset"] == name) | (place["dataset"] == name)]
    att, ftd = (at(place, method=method)["paper_mean"].iloc[-1] for method in ("ATT", "FTD"))
    assert att - ftd == pytest.approx(points)


@pytest.mark.parametrize("row", table_rows(rivals=True), ids=lambda row: row.name)
def test_every_row_resolves_to_the_method_of_its_name_and_says_its_source(row):
    titles = {"label_solve": "Label Solve", "cafe_dsa": "CAFE+DSA"}
    method = titles.get(row.method, (row.method or "att").upper())
    where = {"dataset": row.dataset, "subset": row.subset or "", "ipc": row.ipc, "method": method}
    *_, planned = at(PLANNED, **where).to_dict("records")
    options = planned["options"]
    assert (options.dataset, options.ipc) == (row.dataset, row.ipc)
    assert title(vars(options)) == method
    assert planned["gpu_hours"] > 0
    assert (planned["expert_gpu_hours"] > 0) == METHODS[options.method].needs_experts
    assert options.starts.end > options.starts.first
    if row.method:
        source = row.yaml.read_text().splitlines()[0]
        ours = {"bptt": "values of a short run"}  # nobody has published them
        assert ours.get(row.method, "github.com/") in source


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
        ({"length": "fixed", "start_epochs": [0, 4], "soft_labels": True}, "DATM"),
        ({"length": "fixed", "start_epochs": [0, 4], "flat": True}, "DATM, hard labels"),
        ({"length": "fixed", "flat": True, "soft_labels": True}, "FTD + soft labels"),
        ({"prune_threshold": 0.1}, "ATT + PP"),
        ({"flat": True}, "ATT + FTD"),
        (
            {"gradient": "tesla", "start_epochs": [2, 4], "soft_labels": True},
            "ATT + DATM + TESLA",
        ),
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
    assert (lines["gpu_hours"] > 0.01).all()  # Label Solve is the cheapest
    assert all(line[3].startswith("not run: ") for line in cells(lines))
    wanted = {"table": 1, "network": "ConvNetD3", "ipc": 50, "method": "ATT"}
    (line,) = records_of(row_run, **wanted).to_dict("records")
    assert line["paper_mean"] == 74.5
    assert line["gpu_hours"] > 100  # a million steps


def test_a_row_that_is_evaluated_on_its_own_network_only(tmp_path):
    write_row(tmp_path / "r", evaluations=[entry(*FIVE)])
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
            {"count": 7, "records": [{"kind": "diverged", "iteration": 7}]},
            "diverged at iteration 7",
        ),
        (
            {"evaluations": [entry(0.6, 0.6, epochs=300)]},
            "evaluated by 2 networks of 300 epochs instead of 5 of 1000",
        ),
    ],
)
def test_a_run_that_is_not_the_row_never_passes_as_it(tmp_path, changes, difference):
    write_row(tmp_path / "r", row=SHORT, **{"evaluations": [entry(*[0.6] * 5)], **changes})
    lines = records_of(tmp_path, table=2, dataset="CIFAR100", ipc=1, method="ATT")
    assert lines["status"].tolist() == ["not run", "differs"]
    assert lines["differences"].iloc[1] == difference
    assert cells(lines)[1][3] == "60.00 ± 0.00 †"


def test_what_does_not_alter_a_result_is_no_difference(tmp_path):
    free = {"run_name": "mine", "buffer_path": "elsewhere", "eval_it": 7, "seed": 11}
    free |= {"select": "last", "model": "ConvNet"}
    write_row(tmp_path / "r", row=SHORT, evaluations=[entry(*[0.6] * 5)], **free)
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
    write_row(tmp_path / "r", row=row, evaluations=[entry(*[0.65] * 5, model=network)], **changes)
    lines = records_of(tmp_path, dataset=row.dataset, ipc=row.ipc, status="run")
    for line in at(lines, table=3 if row.subset else 2).to_dict("records"):
        assert line["differences"] == ""
        assert line["difference"] == pytest.approx(difference)
        assert wanted.items() <= line.items()


def test_a_method_with_a_figure_but_without_a_row_stands_where_it_was_evaluated(tmp_path):
    changes = {"length": "fixed", "prune_threshold": 0.1, "Iteration": 3}
    wanted = {"table": 2, "dataset": "CIFAR10", "ipc": 10, "method": "PP"}
    write_row(tmp_path / "r", **changes)
    assert records_of(tmp_path, **wanted)["status"].tolist() == ["published"]
    write_row(tmp_path / "s", lr_img=1.0, evaluations=[entry(*[0.65] * 5)], **changes)
    (line,) = records_of(tmp_path, **wanted).to_dict("records")
    assert (line["status"], line["paper_mean"]) == ("differs", 65.5)
    assert line["differences"] == "there is no row of published settings here"


# All runs


def test_one_network_alone_has_no_spread():
    assert mean_and_std(60.0, 0.0, 1) == "60.00"
    assert mean_and_std(60.0, 0.0, 2) == "60.00 ± 0.00"
    assert str(Accuracies((0.6,))) == "60.00% (n=1)"
    assert str(Accuracies((0.06, 0.06))) == " 6.00% ± 0.00% (n=2)"


def test_seeds_share_a_line_with_the_spread_of_their_means(tmp_path):
    for seed, accs in ((0, (0.5, 0.6)), (1, (0.6, 0.7)), (2, (0.7, 0.8))):
        made = {"seed": seed, "run_name": f"{seed}", "evaluations": [entry(*accs)]}
        write_row(tmp_path / f"{seed}", Iteration=3, **made)
    (line,) = listed(tmp_path, network="ConvNetD3").to_dict("records")
    assert (line["seeds"], line["n"], line["of"]) == ("0 1 2", 3, "seeds")
    assert line["mean"] == pytest.approx(65)
    assert line["std"] == pytest.approx((200 / 3) ** 0.5)


def test_settings_that_differ_make_lines_of_their_own_that_say_so(tmp_path):
    common = {"Iteration": 3, "evaluations": [entry(0.5)]}
    for n, lr_img in enumerate((1.0, 3.0)):
        write_row(tmp_path / f"{n}", lr_img=lr_img, **common)
    write_row(tmp_path / "ipc50", row=Row("CIFAR10", None, 50), **common)
    assert [each["also"] for each in listed(tmp_path)["settings"]] == [
        "lr_img 1.0",
        "lr_img 3.0",
        "",
    ]


def test_data_sets_never_share_a_line(tmp_path):
    for n, (dataset, res) in enumerate((("digits", 8), ("digits", 16), ("CIFAR100", 32))):
        changes = {"dataset": dataset, "res": res, "ipc": 1, "Iteration": 3}
        write_row(tmp_path / f"{n}", evaluations=[entry(0.5)], **changes)
    assert listed(tmp_path)["dataset"].tolist() == ["CIFAR100", "digits 16x16", "digits 8x8"]


def test_runs_that_diverged_are_counted(tmp_path):
    records = [logged(100, 0.4), {"kind": "diverged", "iteration": 2, "rate": "lr_img"}]
    write_row(tmp_path / "0", Iteration=3, records=[logged(100, 0.5)])
    write_row(tmp_path / "1", Iteration=3, seed=1, count=2, records=records)
    assert [each["also"] for each in listed(tmp_path)["settings"]] == ["1 of 2 diverged"]
    assert listed(tmp_path)["mean"].tolist() == pytest.approx([45])


def test_real_images_have_lines_each_seed_once(tmp_path):
    for n, lr_img in enumerate((1.0, 3.0)):
        entries = [
            entry(0.2, 0.4, trained_on="random real"),
            entry(0.5, 0.5, trained_on="herding", seed=n),
            entry(0.9, trained_on="full"),
        ]
        write_row(tmp_path / f"{n}", lr_img=lr_img, Iteration=3, evaluations=entries)
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
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "not evaluated" not in {record["status"] for record in records}
    row = [r for r in records if r["table"] == "2" and r["status"] == "run"]
    assert {(r["set"], r["mean"], r["difference"], r["chosen_by"]) for r in row} == {
        (name, "68.0000", "0.3000", "test") for name in ("raw", "ema")
    }
    ours = {r["method"] for r in records if r["status"] == "not run"}
    rivals = "MTT FTD DATM PAD TESLA BPTT DC DD DM DSA CAFE CAFE+DSA LD KIP".split()
    assert ours == {"ATT", "Label Solve", *rivals}
    assert sum(bool(r["paper_mean"]) for r in records) >= len(PUBLISHED)


def test_without_runs_the_report_has_figures_and_costs(tmp_path, capsys):
    assert report.main([str(tmp_path / "none"), "--out", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().err == f"left out: {tmp_path}/none: there is no run directory\n"
    text, records = written(tmp_path / "docs")
    assert "74.5 ± 0.4" in text and "not run: " in text and "All runs" not in text
    assert {r["status"] for r in records} == {"not run", "published"}


def test_what_cannot_be_used_is_named_and_the_rest_is_covered(tmp_path, capsys):
    write_row(tmp_path / "runs/good", Iteration=3, evaluations=[entry(0.5)])
    write_row(tmp_path / "runs/unfinished", Iteration=3, count=2)
    for seed in range(3):
        write_row(tmp_path / f"runs/r{seed}", seed=seed, Iteration=4)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"left out: {tmp_path}/runs/unfinished: is unfinished, 2 of 3 steps",
        f"left out: {tmp_path}/runs/r0 and 2 of other seeds: not evaluated, see eval.py",
    ]
    text, _ = written(tmp_path)
    listed = text.partition("## Left out\n\n")[2].splitlines()
    assert listed == [line.replace("left out: ", "- ") for line in said]
    assert "| CIFAR10 | 10 | ATT |" in text


def test_the_report_of_a_run_of_today(finished, tmp_path):
    assert report.main([str(finished), "--out", str(tmp_path)]) == 0
    assert "| digits 8x8 | 1 | ATT |" in (tmp_path / "results.md").read_text()


def test_a_method_that_matches_no_trajectories_has_no_lengths_and_no_experts(tmp_path):
    """Its steps have a loss and no length; the columns of a trajectory stay empty."""
    how = {"experts": None, "method": "dm", "drop": foreign_flags("dm")}
    own = entry(0.5, model="ConvNetD2")
    write_run(tmp_path / "r", steps_without_lengths(3), evaluations=[own], **how)
    (shown,) = listed(tmp_path)["settings"]
    assert (shown["N_S"], shown["N_T"], shown["experts"]) == ("", "", "")
    assert shown["iterations"] == 3


def test_bad_flags_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--nix"):
        report.main(["--nix"])
