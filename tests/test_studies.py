"""Studies: the runs they plan, and their pages."""

from collections import Counter
from dataclasses import asdict, replace

import pytest
from made_runs import CALL, entry, evaluation, steps, steps_without_lengths, write_run

from scripts.plan.cells import Settings, run_of
from scripts.studies import __main__ as command
from scripts.studies import digits, exactness
from scripts.studies.__main__ import STUDIES
from scripts.studies.trials import SEEDS, cells_of, runs_of
from utils.core.errors import UserError
from utils.methods.registry import METHODS


@pytest.fixture
def settings(tmp_path):
    return Settings("data", str(tmp_path / "buffers"), str(tmp_path / "runs"), "")


@pytest.mark.parametrize("study", STUDIES.values())
def test_no_two_cells_share_a_name_or_a_folder(study, settings):
    experts, rows = cells_of(study.trials(), settings)
    cells = [*experts, *rows]
    for names in ([cell.name for cell in cells], [cell.outputs for cell in cells]):
        assert max(Counter(names).values()) == 1
    assert {cell.needs for cell in rows} - {None} == {cell.name for cell in experts}


def test_every_method_is_in_the_study_of_all_methods(settings):
    methods = {trial.options(settings, 0).method for trial in digits.trials()}
    assert methods == set(METHODS)


def test_ways_to_the_gradient_differ_in_nothing_else(settings):
    free = {"window", "gradient", "run_name"}
    alike = {
        repr(
            {name: v for name, v in asdict(trial.options(settings, 1)).items() if name not in free}
        )
        for trial in exactness.trials()
    }
    assert len(alike) == 1


def write_runs(trials, settings, *, records, entries=lambda trial, seed: ()):
    for trial in trials:
        for seed in SEEDS:
            options = trial.options(settings, seed)
            config = asdict(options) | {"environment": [CALL]}
            count = options.Iteration
            matches = METHODS[options.method].needs_experts
            taken = steps([1] * count, [1] * count) if matches else steps_without_lengths(count)
            write_run(
                run_of(options).path,
                [*taken, *records(trial, seed)],
                evaluations=entries(trial, seed),
                **config,
            )


def test_page_of_all_methods(settings, tmp_path):
    trials = [t for t in digits.trials() if t.is_named(["BPTT", "DATM"]) and t.is_named(["8x8"])]
    accs = {0: 0.80, 1: 0.82, 2: 0.84}

    def entries(trial, seed):
        on = {"tag": "last", "model": "ConvNetD2", "epochs": 300, "dsa": None}
        found = [entry(accs[seed], accs[seed] + 0.02, **on)]
        if trial.line == "DATM":
            soft = entry(0.9, 0.9, **on) | {"trained_on": "distilled raw, soft labels"}
            real = entry(0.5, 0.5, **on) | {"trained_on": "random real"}
            found += [soft, real]
        return [{key: v for key, v in each.items() if key != "dsa"} for each in found]

    def records(trial, seed):
        held = {"peak_bytes": 9e9, "raised_bytes": 12_400_000 + seed}
        return [{"kind": "memory", "iteration": 0, **held}] if trial is trials[0] else []

    write_runs(trials, settings, records=records, entries=entries)
    runs, problems = runs_of(trials, settings)
    page = digits.page(runs, tmp_path)
    assert not problems
    alone, more = page.split("## With what else was learned")
    assert "| BPTT | 83.00 ± 1.63 | 83.00 ± 1.63 |" in alone
    assert "| random real | 50.00 ± 0.00 | 50.00 ± 0.00 |" in alone
    assert "90.00" not in alone  # soft labels stand in a table of their own
    assert "Soft labels:" in more and "| DATM | 90.00 ± 0.00 | 90.00 ± 0.00 |" in more
    first = next(iter(trials)).line
    assert f"| {first} | 1.00 | 12 | 1.00 |  |" in page


def test_page_about_exactness(settings, tmp_path):
    gain = {"exact": 0.3, "TESLA": 0.1}

    def records(trial, seed):
        after = 0.6 + gain.get(trial.line, 0.2)
        return [evaluation(0, 0.6, 0.6), evaluation(80, after, after)]

    write_runs(exactness.trials(), settings, records=records)
    runs, _ = runs_of(exactness.trials(), settings)
    page = exactness.page(runs, tmp_path)
    assert "| exact | 60.00 ± 0.00 | 90.00 ± 0.00 |" in page
    assert "| TESLA | 60.00 ± 0.00 | 70.00 ± 0.00 |" in page
    assert "exact 1.00 s" in page
    assert (tmp_path / exactness.FIGURE).stat().st_size > 10_000


def test_missing_runs_are_named_and_an_empty_page_is_refused(settings, tmp_path, capsys):
    common = ["--save_path", settings.save_path, "--buffer_path", settings.buffer_path]
    with pytest.raises(UserError, match=r"no run in .*runs has ended"):
        command.main(["exactness", *common, "--out", str(tmp_path)])
    trials = list(exactness.trials())
    write_runs(trials[:1], settings, records=lambda trial, seed: [evaluation(20, 0.5, 0.5)])
    command.main(["exactness", *common, "--out", str(tmp_path)])
    page = (tmp_path / "study_exactness.md").read_text()
    assert page.count(": not run") == len(SEEDS) * (len(trials) - 1)
    assert "## Left out" in page and CALL["git_commit"] in page


def test_a_run_of_other_settings_is_no_part_of_the_page(settings):
    trial = next(iter(exactness.trials()))
    write_runs([trial], settings, records=lambda trial, seed: [])
    assert len(runs_of([trial], settings)[0]) == len(SEEDS)
    other = replace(trial, flags=f"{trial.flags} --lr_img 0.02")
    runs, problems = runs_of([other], settings)
    assert not runs and problems[0] == "exact, exactness, seed 0: lr_img is 0.01, not 0.02"


def test_only(capsys):
    with pytest.raises(UserError, match="--only 'FDT' is no trial; choices: ATT; 8x8, IPC 1; MTT"):
        command.main(["digits", "--only", "FDT"])
    command.main(["digits", "--dry-run", "--only", "8x8, IPC 1"])
    table = capsys.readouterr().out.split("GPU hours")[1].splitlines()
    cells = [line for line in table if " steps " in line]
    assert cells and all(line.startswith("8x8_ipc_1/") for line in cells)
