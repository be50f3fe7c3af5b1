"""scripts/results: run directories with known answers, and those that cannot be used."""

import json
import re
from functools import partial
from operator import attrgetter

import pytest
import yaml
from made_runs import CALL, att, entry, evaluation, steps, write_row, write_run

from scripts.results.evaluations import measured
from scripts.results.runs import read_run, read_runs

logged = partial(evaluation, model="ConvNetD3")
NO_ACCURACY = [{"trained_on": "distilled raw"}]


def counting(folder):
    """What counts: by set or kind of images and network, the mean and how it was chosen."""
    return {
        (row["set"] or row["trained_on"], row["network"]): (round(row["mean"], 9), row["chosen_by"])
        for row in measured(read_run(folder))
    }


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_chosen_iteration_counts_before_the_last_and_any_other(tmp_path, first, reverse):
    entries = [entry(0.5), entry(0.6, tag="last"), entry(0.7, tag="100", epochs=2000)][first:]
    folder = write_row(tmp_path / "r", Iteration=3, evaluations=entries[:: -1 if reverse else 1])
    expected = [(50, "test"), (60, "last"), (70, "iteration 100")][first]
    assert counting(folder) == {("raw", "ConvNetD3"): expected}


def test_what_counts_is_augmented_alike_then_the_longest_then_the_most_then_the_latest(tmp_path):
    entries = [
        entry(0.5, 0.5),
        entry(0.6, 0.6),
        entry(0.7, model="ConvNetD3"),
        entry(0.8, 0.8, 0.8, epochs=3),
        entry(0.9, 0.9, dsa=None),
    ]
    folder = write_row(tmp_path / "r", Iteration=3, evaluations=entries)
    assert counting(folder) == {("raw", "ConvNetD3"): (60, "test")}


@pytest.mark.parametrize(("select", "mean"), [("test", 62), ("val", 50), ("last", 60)])
def test_without_eval_json_the_log_counts_as_the_run_chose(tmp_path, select, mean):
    """Other networks follow the iteration that the own one chose."""
    records = [
        logged(0, 0.3, val_accs=[0.3]),
        logged(100, 0.62, val_accs=[0.4]),
        logged(100, 0.2, model="VGG11", val_accs=[0.9]),
        logged(200, 0.5, val_accs=[0.45]),
        logged(300, 0.6, val_accs=[0.41]),
        logged(300, 0.55, set="ema", val_accs=[0.7]),
    ]
    how = {"select": select, "val_fraction": 0.1}
    expected = {("raw", "ConvNetD3"): (mean, select), ("ema", "ConvNetD3"): (55, select)}
    if select == "test":
        expected["raw", "VGG11"] = (20, select)
    assert counting(write_row(tmp_path / "r", Iteration=3, records=records, **how)) == expected


def test_eval_json_counts_before_the_log(tmp_path):
    records = [logged(3, 0.9), logged(3, 0.8, set="ema")]
    folder = write_row(tmp_path / "r", Iteration=3, records=records, evaluations=[entry(0.5)])
    own = "ConvNetD3"
    assert counting(folder) == {("raw", own): (50, "test"), ("ema", own): (80, "test")}


def test_an_evaluation_of_the_initial_images_is_none_of_the_run(tmp_path):
    assert counting(write_row(tmp_path / "r", Iteration=3, records=[logged(0, 0.9)])) == {}


def test_a_run_that_went_on_after_it_diverged_has_not(tmp_path):
    records = [{"kind": "diverged", "iteration": 2}, {"kind": "step", "iteration": 2}]
    assert (
        read_run(write_row(tmp_path / "r", Iteration=3, count=2, records=records)).diverged is None
    )


def test_runs_of_a_smoke_run_are_no_results_unless_they_are_named(tmp_path):
    write_row(tmp_path / "smoke/now/r", Iteration=3)
    for folder, count in ((tmp_path, 0), (tmp_path / "smoke", 1)):
        assert len(read_runs([folder], attrgetter("steps"))[0]) == count


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    folder = write_row(tmp_path / "r", Iteration=3)
    found, problems = read_runs([tmp_path, folder], attrgetter("steps"))
    assert (len(found), problems) == (1, [])


def test_runs_of_earlier_versions_are_read(tmp_path):
    """Without the settings, records and entries that came later; one call instead of a list."""
    later = ["flat", "val_fraction", "select", "gradient", "prune_threshold", "start_epochs"]
    later += ["current_max_start_epoch", "expansion_end_epoch", "log_distances", "trajectories"]
    old = {name: value for name, value in entry(0.5, 0.6).items() if name != "seed"}
    del old["environment"]
    folder = write_row(tmp_path / "r", Iteration=3, drop=later, evaluations=[old])
    content = yaml.safe_load((folder / "config.yaml").read_text())
    del content["experts"]
    content["environment"] = content["environment"][0]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    run = read_run(folder)
    assert (run.method, run.experts, run.environments) == ("ATT", None, [CALL])
    assert counting(folder) == {("raw", "ConvNetD3"): (55, "test")}


def test_a_setting_that_a_run_does_not_know_had_its_default(tmp_path):
    old, new = (
        read_run(att(tmp_path / name, [1, 2], syn_steps=30, drop=drop)).settings()
        for name, drop in (("old", ["distance"]), ("new", []))
    )
    assert old == new


def test_what_distill_att_writes_today_is_read(finished):
    run = read_run(finished)
    assert (run.options.dataset, run.method, run.diverged) == ("digits", "ATT", None)
    assert run.experts["number"] == 2
    assert {(row["trained_on"], row["network"]) for row in measured(run)} == {
        ("distilled raw", run.model),
        ("distilled ema", run.model),
    }


def with_file(name, content):
    """A run where a file has this content, is a "folder" or, with None, is not there."""

    def damage(path):
        file = write_row(path, Iteration=3, seed=1) / name
        file.unlink(missing_ok=True)
        if content == "folder":
            file.mkdir()
        elif content is not None:
            file.write_bytes(content)

    return damage


def with_step(**changes):
    (step,) = steps([1], [1])
    step = {name: value for name, value in (step | changes).items() if value is not None}
    return with_records([step], Iteration=1)


def with_records(records, **config):
    return lambda path: write_run(path, records, **config)


UNUSABLE = {
    r"a/config\.yaml is not valid YAML": with_file("config.yaml", b"model: ["),
    r"b/config\.yaml is not valid YAML": with_file("config.yaml", b"\xff\xfe\x00\x80"),
    r"c/config\.yaml: No such file": with_file("config.yaml", None),
    r"d/config\.yaml: unknown key 'lr'": with_file("config.yaml", b"lr: 1"),
    r"e/config\.yaml: is of another version, it lacks dataset, model, ipc, lr_img,": with_file(
        "config.yaml", b"seed: 1"
    ),
    r"f: is unfinished, 0 of 3 steps": with_file("metrics.jsonl", None),
    r"g/metrics\.jsonl: Is a directory": with_file("metrics.jsonl", "folder"),
    r"h/eval\.json cannot be read": with_file("eval.json", json.dumps(NO_ACCURACY).encode()),
    r"i: is unfinished, 2 of 3 steps": with_records(steps([1, 1], [1, 1]), Iteration=3),
    r"j/config\.yaml: length: unknown value 'longest'; choices: att, fixed": with_records(
        [], length="longest"
    ),
    r"k/config\.yaml: syn_steps: 'many' is not a whole number": with_records([], syn_steps="many"),
    r"l/config\.yaml: is of another version, it lacks length": with_records([], drop=["length"]),
    r"m: is of another version, its steps lack 'n_opt'": with_step(n_opt=None),
    r"n: is damaged, its steps hold no numbers": with_step(n_opt="long"),
    r"o: is damaged, its steps hold no numbers": with_records(
        steps([[1, 2], [1]], [[1, 2], [1]]), syn_steps=5
    ),
    r"p: is damaged, its steps hold no numbers": with_step(length=[1, 2], n_opt=[1]),
    r"q: is damaged, its steps do not follow one another": with_records(
        steps([1], [1]) * 2, Iteration=1
    ),
    r"r: has the settings and seed of \S+/a_good": partial(
        write_row, Iteration=3, evaluations=[entry(0.5)]
    ),
}


def test_what_cannot_be_used_is_named_in_one_line_each(tmp_path):
    write_row(tmp_path / "a_good", Iteration=3, evaluations=[entry(0.5)])
    for pattern, make in UNUSABLE.items():
        make(tmp_path / pattern[0])

    runs, problems = read_runs([tmp_path, tmp_path / "nowhere"], attrgetter("evaluations", "steps"))
    assert [run.path.name for run in runs] == ["a_good"]
    expected = [*UNUSABLE, f"{tmp_path}/nowhere: there is no run directory"]
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in problems) == 1, pattern
    assert len(problems) == len(expected)
    assert not any("\n" in line for line in problems)
