"""run_all.sh: the plan, the queue, and some of it in miniature on digits."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import forking
import pytest
import torch

import buffer
from scripts.plan import __main__ as plan
from scripts.plan import cells as planned
from scripts.plan import devices
from scripts.plan.cells import RUN_NAME, Cell, Settings, choose, make_cells, table_rows
from scripts.plan.devices import PYTHON, Devices
from scripts.plan.estimate import Estimate
from scripts.plan.finished import inputs_of, is_finished, record_finished
from scripts.plan.queue import Queue, run_command, run_plan
from scripts.plan.tables import Outcome, say_outcomes
from utils.core.errors import UserError
from utils.core.locks import locked
from utils.core.stopping import Interrupted
from utils.experts.files import read_file
from utils.options import BufferOptions
from utils.plan.machine import A100

ROOT = Path(__file__).parent.parent
REAL = Settings(data_path="data", buffer_path="buffers", save_path="results", run_name=RUN_NAME)
COSTS = r" +(?:\S.* )?([\d,.]+) +([\d,.]+) +([\d,.]+)$"  # hours, memory, disk at the end of a line
TWO_GPUS = {"gpu0": 2.0, "gpu1": 2.0}


@pytest.fixture(autouse=True, scope="module")
def made_once():
    """Resolving every command of a plan takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "make_cells", cache(make_cells))
        yield


def start(*arguments, **environment):
    """Begin a script as a user does; `environment` joins that of the tests."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("run_all.sh would install .venv first: run the tests by scripts/test.sh")
    return subprocess.Popen(
        ["bash", *map(str, arguments)],
        cwd=ROOT,
        env=forking.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bash(*arguments, **environment):
    """Exit status, output and errors of a script."""
    with start(*arguments, **environment) as process:
        out, errors = process.communicate(timeout=900)
    return process.returncode, out, errors


def costs(name, table):
    """The columns of the lines of a plan whose name matches."""
    found = re.findall(rf"^{name}{COSTS}", table, re.MULTILINE)
    return [tuple(float(value.replace(",", "")) for value in line) for line in found]


def chosen(*only, rivals=False, **settings):
    """Cells of experts and of rows, by name."""
    parts = choose(replace(REAL, **settings), only, rivals=rivals)
    return tuple({cell.name: cell for cell in part} for part in parts)


def test_the_plan_has_every_row_and_experts_that_rows_share():
    experts, rows = chosen()
    table = [f"{name}/ipc{k}" for name in ("CIFAR10", "CIFAR100") for k in (1, 10, 50)]
    table += [f"Tiny/ipc{k}" for k in (1, 10)]
    assert list(rows)[:8] == table
    assert len(rows) == 8 + 6 * 2
    assert len(experts) == 5 + 6
    needs = {name: row.needs for name, row in rows.items()}
    assert needs["CIFAR10/ipc1"] == needs["CIFAR10/ipc10"] == "experts/CIFAR10/ConvNetD3"
    assert needs["CIFAR10/ipc50"] == "experts/CIFAR10_NO_ZCA/ConvNetD3"
    assert set(needs.values()) == set(experts)


def test_rivals_have_rows_when_they_are_asked_for():
    """They share the experts of ATT without making them longer."""
    experts, rows = chosen(rivals=True)
    assert not any(row.method for row in table_rows())
    assert len(rows) == len(table_rows(rivals=True)) > 40
    assert {"CIFAR10/ipc10", "CIFAR10/ipc10/ftd", "CIFAR10/ipc10/mtt"} <= set(rows)
    assert {row.needs for row in rows.values() if row.needs} == set(experts)
    without = {name for name, row in rows.items() if not row.needs}
    free = {"bptt", "dm", "dc", "dsa", "cafe", "cafe_dsa", "dd", "ld", "kip", "label_solve"}
    assert without == {name for name in rows if name.rpartition("/")[2] in free}
    own, _ = chosen()
    assert own.items() < experts.items()
    late = experts["experts/CIFAR100_FLAT/ConvNetD3"]  # DATM's
    ranked = experts["experts/CIFAR100_FLAT_EASY_FIRST/ConvNetD3"]  # PAD's, by ten of those
    few, whole = (buffer.parse(shlex.split(each)[1:]).options for each in ranked.commands)
    assert (few.flat, few.easy_first, few.num_experts, few.train_epochs) == (True, False, 10, 71)
    assert (whole.flat, whole.easy_first, whole.num_experts) == (True, True, 100)
    assert (whole.train_epochs, whole.all_from) == (100, None)
    assert ranked.estimate.hours > late.estimate.hours * (0.1 + 100 / 71 * 0.8)
    assert "--train_epochs 71" in late.commands[0]


def test_experts_are_long_enough_for_all_their_rows():
    experts, _ = chosen(distill_flags=("--max_start_epoch", "70"))
    of_cifar10, of_tiny = experts["experts/CIFAR10/ConvNetD3"], experts["experts/Tiny/ConvNetD4"]
    assert "--train_epochs 73" in of_cifar10.commands[0]  # N_T 4 of the IPC 1 row
    assert "--train_epochs 71" in of_tiny.commands[0]
    assert of_tiny.options[0].train_epochs == 71


CIFAR10, FLAT = "experts/CIFAR10/ConvNetD3", "experts/CIFAR{}_FLAT/ConvNetD3"
TINY, IMAGENETTE = "experts/Tiny/ConvNetD4", "experts/ImageNet/imagenette/128/ConvNetD5"


@pytest.mark.parametrize(
    ("only", "rows", "experts"),
    [
        ("CIFAR10/ipc1", "CIFAR10/ipc1", CIFAR10),
        ("Tiny", "Tiny/ipc1 Tiny/ipc10", TINY),
        ("imagenette/ipc10", "ImageNet/imagenette/ipc10", IMAGENETTE),
        ("experts/CIFAR100_NO_ZCA", "", "experts/CIFAR100_NO_ZCA/ConvNetD3"),
        ("experts/tiny CIFAR10/ipc1", "CIFAR10/ipc1", f"{CIFAR10} {TINY}"),
        # What ATT does not have is a rival's.
        (
            "Tiny/ipc50",
            "Tiny/ipc50/datm Tiny/ipc50/mtt Tiny/ipc50/pad",
            f"{TINY} experts/Tiny_ZCA_FLAT/ConvNetD4 experts/Tiny_ZCA_FLAT_EASY_FIRST/ConvNetD4",
        ),
        ("FTD", "CIFAR10/ipc10/ftd CIFAR100/ipc10/ftd", f"{FLAT.format(10)} {FLAT.format(100)}"),
        ("CIFAR10/ipc10/ftd", "CIFAR10/ipc10/ftd", FLAT.format(10)),
        ("CIFAR10/ipc1/DM", "CIFAR10/ipc1/dm", ""),
        ("CIFAR10/ipc1/mtt CIFAR10/ipc1", "CIFAR10/ipc1 CIFAR10/ipc1/mtt", CIFAR10),
    ],
)
def test_selectors_name_cells_or_parts_and_rows_come_with_their_experts(only, rows, experts):
    found_experts, found_rows = chosen(*only.split())
    assert " ".join(found_rows) == rows
    assert set(found_experts) == set(experts.split())


def test_a_part_of_names_selects_all_that_have_it():
    experts, rows = chosen("ipc1", "CIFAR10/ipc10")
    assert len(rows) == 3 + 6 + 1
    assert all(name.endswith("/ipc1") or name == "CIFAR10/ipc10" for name in rows)
    assert len(experts) == 3 + 6  # no rows without ZCA among them
    _, rows = chosen("CIFAR10/ipc10", rivals=True)
    methods = "cafe cafe_dsa datm dc dd dm dsa ftd kip label_solve ld mtt pad".split()
    assert list(rows) == ["CIFAR10/ipc10", *(f"CIFAR10/ipc10/{method}" for method in methods)]


FIXED = {"run_name": "fixed", "distill_flags": ("--length", "fixed")}


@pytest.mark.parametrize(
    ("name", "settings", "folder", "flags"),
    [
        ("CIFAR10/ipc1", {}, "CIFAR10/ConvNetD3/ipc1/run_all", "--ipc 1"),
        ("Tiny/ipc1", {}, "Tiny/ConvNetD4/ipc1/run_all", "--dataset Tiny"),
        ("CIFAR10/ipc10/ftd", {}, "CIFAR10/ConvNetD3/ipc10/run_all_ftd", "CIFAR10/ipc10_ftd.yaml"),
        ("CIFAR10/ipc1/fixed", FIXED, "CIFAR10/ConvNetD3/ipc1/fixed", "--length fixed"),
    ],
)
def test_a_row_is_distilled_and_evaluated(name, settings, folder, flags):
    """On its own network and the others of Table 1."""
    (experts,), (row,) = (cells.values() for cells in chosen(name, **settings))
    run, is_tiny = Path("results", folder), "Tiny" in name
    networks = "--model ConvNetD4 ResNet18 VGG11 AlexNet" if is_tiny else "--eval_mode M"
    distill, raw, ema = row.commands
    assert row.name == name and flags in distill
    assert raw.endswith(f"{run}/distilled_best.pt --data_path data {networks} --random")
    assert ema.endswith(f"{run}/distilled_ema_best.pt --data_path data {networks}")
    assert len(row.options) == 3
    assert row.outputs == (run,)
    assert set(row.inputs) == {Path("data"), *experts.outputs}


def test_flags_that_do_not_suit_a_rival_do_not_hinder_att():
    early = {"distill_flags": ("--start_epochs", "0", "5")}
    assert len(chosen(**early)[1]) == 20
    with pytest.raises(UserError, match="--start_epochs is no setting of --method bptt"):
        chosen("DATM", **early)


def test_rivals_run_in_miniature_too():
    experts, rows = chosen("CIFAR10/ipc10/datm", smoke=True)
    command = rows["CIFAR10/ipc10/datm"].commands[0]
    assert "--start_epochs 0 1" in command
    assert "--max_start_epoch" not in command
    assert list(experts) == ["experts/digits_ZCA_FLAT/ConvNetD1"]
    experts, _ = chosen("CIFAR10/ipc10/pad", smoke=True)
    (cell,) = experts.values()
    assert cell.name == "experts/digits_ZCA_FLAT_EASY_FIRST/ConvNetD1"
    ends = [command.split("--flat ")[1] for command in cell.commands]
    few = "--num_experts 2 --train_epochs 2"
    assert ends == [few, f"--easy_first {few} --el2n_experts 2"]


@pytest.mark.parametrize(
    ("table", "rows", "rivals"),
    [
        (1, r"CIFAR10/ipc[15]0", 24),
        (2, r"(CIFAR10|CIFAR100|Tiny)/.*", 76),
        (3, r"ImageNet/image(nette|woof|fruit|meow)/.*", 8),
    ],
)
def test_a_script_of_a_table_runs_its_rows(table, rows, rivals):
    script = (ROOT / f"scripts/run_table{table}.sh").read_text()
    only = re.findall(r"--only (\S+)", script)
    assert "--report" in script and script.rstrip().endswith('"$@"')
    own = [name for name in chosen()[1] if re.fullmatch(rows, name)]
    assert list(chosen(*only)[1]) == own
    assert len(chosen(*only, rivals=True)[1]) == len(own) + rivals


def test_a_dry_run_prints_commands_and_costs_and_does_nothing(tmp_path, capsys):
    where = ["--save_path", str(tmp_path / "r"), "--buffer_path", str(tmp_path / "b")]
    assert plan.main(["--dry-run", "--run", "--report", *where]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert f"buffer.py --dataset Tiny --model ConvNetD4 --buffer_path {tmp_path}/b" in out
    best = tmp_path / "r/CIFAR10/ConvNetD3/ipc50/run_all/distilled_best.pt"
    assert f"eval.py --distilled {best} --data_path data --eval_mode M --random" in out
    sizes = {"CIFAR10": 6.5, "CIFAR100": 10.3, "Tiny": 17.5, "ImageNet/imagewoof/128": 12.6}
    for experts, disk in sizes.items():  # the README's
        ((_, _, estimated),) = costs(f"experts/{experts}/ConvNetD[345]", out)
        assert estimated == pytest.approx(disk, rel=0.01)
    cells, ((hours, memory, disk),) = costs(r"[^ :]+/[^ :]+", out), costs("31 in all", out)
    assert len(cells) == 31
    assert hours == pytest.approx(sum(cell[0] for cell in cells), abs=2)
    assert memory == max(cell[1] for cell in cells)
    assert disk == pytest.approx(sum(cell[2] for cell in cells), abs=2)


def test_hours_grow_with_the_steps():
    def hours(*flags):
        return chosen("CIFAR10/ipc1", distill_flags=flags)[1]["CIFAR10/ipc1"].estimate.hours

    # seconds, compiled: 80 steps on ten images are bound by launching kernels
    step = (80 * 3 * A100.speed.step_seconds + 80 * 10 * 11 * 1.01e8 / A100.speed.rate) / 2
    longer = hours("--Iteration", "2000", "--eval_it", "0")
    shorter = hours("--Iteration", "1000", "--eval_it", "0")
    assert 3600 * (longer - shorter) == pytest.approx(1000 * step, rel=0.01)
    assert hours("--Iteration", "1000") > shorter


def test_long_runs_are_evaluated_a_hundred_times():
    _, rows = chosen()
    assert "--eval_it 10000" in rows["CIFAR10/ipc50"].commands[0]
    assert rows["CIFAR10/ipc50"].options[0].eval_it == 10_000
    assert "--eval_it" not in rows["CIFAR10/ipc1"].commands[0]
    _, rows = chosen(distill_flags=("--eval_it", "50"))
    assert all(row.commands[0].count("--eval_it") == 1 for row in rows.values())


def test_slots_follow_memory_and_experts_take_all_gpus():
    experts, rows = (list(cells.values()) for cells in chosen())
    small, large = rows[0], rows[-1]
    assert 2 < small.estimate.memory < 10 < large.estimate.memory < 20
    many, one = Devices({"0": 80.0, "1": 40.0}, 4), Devices({"0": 80.0}, 4)
    assert [many.slots_for(cell) for cell in (small, large, experts[0])] == [1, 2, 8]
    assert [one.slots_for(cell) for cell in (small, large, experts[0])] == [1, 1, 4]
    assert Devices({"0": 8.0}, 4).slots_for(large) == 4
    torchrun = ".venv/bin/torchrun --standalone --nproc_per_node 2 buffer.py "
    assert many.command_lines(experts[0])[0].startswith(torchrun)
    assert one.command_lines(experts[0])[0].startswith(".venv/bin/python buffer.py ")
    assert many.command_lines(small)[1].startswith(".venv/bin/python eval.py ")


@pytest.mark.slow
def test_the_command_for_several_gpus_trains_the_experts(tmp_path):
    where = {"save_path": str(tmp_path), "buffer_path": str(tmp_path / "b")}
    experts, _ = chosen(smoke=True, **where)
    cell = experts["experts/digits/ConvNetD1"]
    (command,) = Devices({"0": 80.0, "1": 80.0}, 4).command_lines(cell)
    status, _, errors = bash("-c", command)
    assert status == 0, errors
    assert len(read_file(tmp_path / "b/digits/ConvNetD1/replay_buffer_0.pt")) == 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--only", "CIFAR10/ipc2"], ["'CIFAR10/ipc2'", "CIFAR10/ipc10", "experts/Tiny"]),
        (["--only", ""], ["''", "CIFAR10/ipc1"]),
        (
            ["--only", "CIFAR10/ipc1/FTD"],
            [
                "'CIFAR10/ipc1/FTD'",
                "BPTT, CAFE, CAFE_DSA, DATM, DC, DD, DM, DSA, FTD, KIP, LABEL_SOLVE, LD, MTT, PAD",
            ],
        ),
        (["--onyl", "Tiny"], ["--onyl", "flags: --help, --only, --rivals, --dry-run, --smoke"]),
        (["Tiny"], ["Tiny", "--only"]),
        (["--list", "cells"], ["cells", "rows", "experts"]),
        (["--run_name", "a/b"], ["--run_name", "a/b"]),
        (["--", "--lenght", "fixed"], ["--lenght"]),
        (["--", "--length", "long"], ["--length", "'long'", "fixed"]),
        (["--", "--dataset", "Tiny"], ["--dataset", "--only"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(argv, parts, tmp_path, monkeypatch, capsys):
    where = ["--save_path", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["plan", "--run", *where, *argv])
    assert run_command(plan.main, script="run_all.sh") == 2
    out, said = capsys.readouterr()
    assert out == "" and re.fullmatch(r"run_all\.sh: error: .*\n", said)
    assert not list(tmp_path.iterdir())
    for part in parts:
        assert part in said


def test_a_task_of_the_job_array_is_one_cell(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    array = ["scripts/slurm/array.sbatch", "rows", "--run_name", "x", "--dry-run"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    status, out, errors = bash(*array, SLURM_ARRAY_TASK_ID="6", PATH=path)
    assert status == 0, errors
    assert len(costs("Tiny/ipc1/x", out)) == 1
    assert len(costs("2 in all", out)) == 1  # itself and its experts
    assert "ConvNetD4/ipc1/x/distilled_best.pt" in out


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Work on cells with two GPUs of two slots, 1 GB each; the statuses by name."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(devices, "TORCHRUN", f"{PYTHON} -X")  # which ignores the number behind it
    # A shell lets its background jobs ignore SIGINT, and so the tests, where they are such.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}

    def work(*phases):
        queue = Queue(Devices(TWO_GPUS, 2), tmp_path / "logs")
        for cells in phases:
            queue.work(cells)
        return {name: outcome.status for name, outcome in queue.outcomes.items()}

    yield work
    for number, handler in before.items():
        signal.signal(number, handler)


def cell(name, *codes, hours=0.0, gb=1.0, **fields):
    """A cell whose commands are pieces of Python."""
    commands = tuple(shlex.join(["-S", "-c", code]) for code in codes)
    return Cell(name, "", commands, Estimate(hours, gb, 0.0), **fields)


def noting(path, slots=1, *, seconds=0.0):
    """Code that notes the device and the slots that it takes, then those that it gives back."""
    note = f"print(os.environ['CUDA_VISIBLE_DEVICES'], {{}}, file=open({str(path)!r}, 'a'))"
    return f"import os, time; {note.format(slots)}; time.sleep({seconds}); {note.format(-slots)}"


def noted(path):
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(device, int(change)) for device, change in lines]


@pytest.mark.parametrize(("needed", "peak"), [([1] * 5, 4), ([1, 1, 2, 1, 2], 3)])
def test_cells_share_devices_as_their_slots_allow(call, tmp_path, capsys, needed, peak):
    """No device is ever overfull, and none is idle while cells that fit are waiting."""
    events = tmp_path / "events"
    done = call(
        [
            cell(f"cell{n}", noting(events, slots, seconds=1), gb=slots)
            for n, slots in enumerate(needed)
        ]
    )
    assert all(status.startswith("done in ") for status in done.values())
    used, most = dict.fromkeys(TWO_GPUS, 0), 0
    for device, change in noted(events):
        used[device] += change
        assert used[device] <= 2
        most = max(most, sum(used.values()))
    assert most >= peak
    started = re.findall(r"started on device (\w+)", capsys.readouterr().out)
    assert set(started[:2]) == {"gpu0", "gpu1"}  # spread


def test_experts_of_a_later_stage_find_those_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = tmp_path / "made"
    early = cell("early", f"import time; time.sleep(1); open({str(made)!r}, 'w')")
    late = cell("late", f"open({str(made)!r})", hours=9.0, stage=1)  # longer, so else the first
    assert run_plan([late, early], [], Devices({}, 2), tmp_path / "logs") == 0


def test_the_longest_begin_first_and_none_overtakes_one_on_all_devices(call, tmp_path, capsys):
    code = noting(tmp_path / "events", seconds=0.3)
    cells = [cell("short", code, hours=1), cell("large", code, hours=5, is_experts=True)]
    call([*cells, cell("long", code, hours=9)])
    assert re.findall(r"(\w+): started", capsys.readouterr().out) == ["long", "large", "short"]
    used = ["gpu0", "gpu0,gpu1", "gpu0"]
    assert noted(tmp_path / "events") == [(name, sign) for name in used for sign in (1, -1)]


def test_a_failed_cell_stops_only_those_that_need_it(call, tmp_path):
    events, logs = tmp_path / "events", tmp_path / "logs"
    fails = cell("experts/x", "print('oh no'); raise SystemExit(3)", noting(events))
    experts = [fails, cell("experts/y", "pass")]
    rows = [cell(f"{name}/ipc1", "pass", needs=f"experts/{name}") for name in "xy"]
    status = call(experts, rows)
    assert status["x/ipc1"] == "not run: experts/x failed"
    assert status["y/ipc1"].startswith("done in 0:00:0")
    assert status["experts/x"] == "failed: exit 3"
    *_, command, said = (logs / "experts/x.log").read_text().splitlines()
    assert (command.count(" && "), said) == (1, "oh no")
    assert (logs / "experts/x.status").read_text() == "failed: exit 3\n"
    assert not events.exists()  # which its second command would have made
    assert call([cell("z", "import os; os.kill(os.getpid(), 9)")]) == {"z": "failed: exit 137"}


@pytest.mark.parametrize("finishes", [False, True])
def test_a_cell_that_another_call_works_on_is_waited_for(call, tmp_path, capfd, finishes):
    """And not run again where that call has finished it; other cells do not wait."""
    events, logs, out = tmp_path / "events", tmp_path / "logs", tmp_path / "out"
    same = cell("same", noting(events), outputs=(out,))
    other = cell("other", f"open({str(tmp_path / 'ran')!r}, 'w')")
    held = threading.Event()

    def another_call():
        with locked(logs / ".same.log.lock"):
            held.set()
            assert wait_for(tmp_path / "ran")
            if finishes:
                out.mkdir()
                (out / "set").touch()
                record_finished(same, logs / "same.done", inputs=inputs_of(same))

    thread = threading.Thread(target=another_call)
    thread.start()
    held.wait()
    status = call([same, other])
    thread.join()
    assert capfd.readouterr().out.count("same: waiting: another call is at it") == 1
    assert [change for _, change in noted(events)] == ([] if finishes else [1, -1])
    assert status["same"].startswith("done before" if finishes else "done in")


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()


@pytest.mark.parametrize(
    ("number", "received"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, 15)],
)
def test_a_signal_lets_running_commands_save_and_ends_the_queue(call, tmp_path, number, received):
    ready, saved, events = tmp_path / "ready", tmp_path / "saved", tmp_path / "events"
    saves = f"lambda n, f: (open({str(saved)!r}, 'a').write(f'{{n}} '), sys.exit(128 + n))"
    code = f"import signal, sys, time; s = {saves}; [signal.signal(n, s) for n in (2, 15)]; "
    code += f"open({str(ready)!r}, 'w'); time.sleep(60)"
    strike = threading.Thread(target=lambda: wait_for(ready) and os.kill(os.getpid(), number))
    strike.start()
    with pytest.raises(Interrupted) as interrupted:
        call(
            [
                cell("running", code, noting(events), gb=2),
                cell("next", noting(events), is_experts=True),
            ]
        )
    strike.join()
    assert interrupted.value.args == (number,)
    assert saved.read_text() == f"{int(received)} "  # once, and it was waited for
    assert (tmp_path / "logs/running.status").read_text() == "interrupted\n"
    assert not events.exists()


def test_an_error_of_the_queue_ends_its_commands_first(call, tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = f"import signal, time; signal.signal(15, lambda n, f: open({str(saved)!r}, 'w')); "
    code += f"open({str(ready)!r}, 'w'); time.sleep(3)"
    (tmp_path / "logs/bad.status").mkdir(parents=True)  # which cannot be written
    waits = f"import os, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(0.05)"
    with pytest.raises(UserError, match=r"cannot write .*bad\.status"):
        call([cell("running", code), cell("bad", waits)])
    assert saved.exists()


@pytest.fixture
def finished(tmp_path):
    """A cell that is recorded as done, with an output and data of eight bytes."""
    for name in ("out/set", "data/images"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"as it is")
    done = cell(
        "a/b",
        noting(tmp_path / "events"),
        options=(BufferOptions(num_experts=2),),
        outputs=(tmp_path / "out",),
        inputs=(tmp_path / "data",),
    )
    record_finished(done, tmp_path / "logs/a/b.done", inputs=inputs_of(done))
    return done


def test_a_finished_cell_is_not_run_again(call, finished, tmp_path, capfd):
    (tmp_path / "out/.lock").touch()  # hidden files do not count
    row = cell("row", "", needs="a/b")
    status = call([finished], [row])
    assert status["a/b"] == "done before" and status["row"].startswith("done in")
    assert not (tmp_path / "events").exists()
    assert "a/b: done before" in capfd.readouterr().out
    assert not (tmp_path / "logs/a/b.status").exists()


CHANGES = {
    "a file damaged in place": lambda c, folder: overwrite(folder / "out/set", b"damaged!"),
    "a file deleted": lambda c, folder: (folder / "out/set").unlink(),
    "a file more": lambda c, folder: (folder / "out/more").touch(),
    "other data": lambda c, folder: (folder / "data/images").write_text("other"),
    "a damaged record": lambda c, folder: (folder / "logs/a/b.done").write_text("{"),
    "another YAML": lambda c, folder: replace(c, options=(BufferOptions(num_experts=3),)),
    "another command": lambda c, folder: replace(c, commands=(c.commands[0] + " --more",)),
    "an evaluation more": lambda c, folder: replace(c, commands=c.commands * 2),
}


def overwrite(path, content):
    with open(path, "r+b") as file:
        file.write(content)


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_cell_is_run_again_after(finished, tmp_path, change):
    record = tmp_path / "logs/a/b.done"
    assert is_finished(finished, record)
    changed = CHANGES[change](finished, tmp_path)
    changed = changed if isinstance(changed, Cell) else finished
    assert not is_finished(changed, record)
    record_finished(changed, record, inputs=inputs_of(changed))
    assert is_finished(changed, record) == (change != "a file deleted")  # nothing is left to record


def test_what_changes_while_a_cell_is_at_work_is_not_taken_for_what_it_read(call, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").write_text("old")
    late = cell(
        "late",
        f"open({str(data / 'images')!r}, 'w').write('new')",
        outputs=(data,),
        inputs=(data,),
    )
    assert [call([late])["late"][:7] for _ in range(2)] == ["done in"] * 2


def evaluated(model, *accs):
    mean = sum(accs) / len(accs)
    measured = {"num_eval": len(accs), "accs": accs, "acc_mean": mean, "acc_std": 0.01}
    return {"trained_on": "distilled raw", "model": model, **measured}


@pytest.mark.parametrize("damaged", ["[{", "{}", '[{"accs": []}]', "[" * 100_000])
def test_the_summary_shows_accuracies_and_what_is_not_done(tmp_path, capsys, damaged):
    record = [evaluated("A", 0.1), evaluated("B", 0.5), evaluated("A", 0.2, 0.4)]
    files = {"x": json.dumps(record), "y": damaged, "z": json.dumps(record)}
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(text)
    status = {"x": "done in 0:00:01", "y": "done before", "z": "not run: experts failed"}
    cells = [cell(name, outputs=(tmp_path / name,)) for name in files]
    assert say_outcomes([Outcome(each, status[each.name], "", tmp_path) for each in cells]) == 1
    head, x, *rest, y = capsys.readouterr().out.splitlines()
    assert head.split() == ["test", "accuracy", "trained", "on", "A", "B"]
    assert re.fullmatch(r"x +distilled raw +30\.00% ± 10\.00% \(n=2\) +50\.00% \(n=1\)", x)
    assert rest == ["", "2 of 3 cells are done", "z: not run: experts failed"]
    assert re.match(r"y: .*y/eval\.json cannot be read as a list of evaluations", y)


ROW = "CIFAR10/ipc10"  # whose experts are trained with ZCA


@pytest.fixture
def run_all(monkeypatch, capfd):
    """Call run_all.sh's command line in this process, its scripts as forks; status and output."""
    for name, value in forking.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)

    def call(*argv):
        status = plan.main(["--run", *map(str, argv)])
        return status, capfd.readouterr().out

    return call


def smoke_flags(folder):
    return ["--smoke", "--save_path", folder, "--only", ROW]


def run_dir(folder, row=ROW):
    (path,) = folder.glob(f"digits/*/*/run_all_{row.replace('/', '_')}")
    return path


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A row in miniature, by a call that was interrupted at once and the same call again: their
    folder; status, output and errors of the second.
    """
    folder = tmp_path_factory.mktemp("smoke")
    argv = ["scripts/run_all.sh", *smoke_flags(folder), "--report", folder]
    with start(*argv) as first:
        while " started on " not in (line := first.stdout.readline()):
            assert line, "the first call has ended"
        first.send_signal(signal.SIGTERM)
        said = first.stdout.read()
    assert first.returncode == 143
    assert said.endswith("interrupted: the same command goes on from here\n")
    (status,) = folder.glob("run_all/experts/*/*.status")
    assert status.read_text() == "interrupted\n"
    return folder, *bash(*argv)


@pytest.mark.slow
def test_the_whole_plan_in_miniature(tmp_path):
    argv = ["scripts/run_all.sh", "--smoke", "--save_path", tmp_path]
    status, out, errors = bash(*argv)
    assert status == 0, out + errors
    assert "16 of 16 cells are done" in out
    assert len(list(tmp_path.glob("digits/*/*/*/eval.json"))) == 10
    saved = torch.load(run_dir(tmp_path, "CIFAR100/ipc50") / "distilled_last.pt", weights_only=True)
    assert (saved["config"]["batch_syn"], saved["zca"]) == (1200, True)
    status, out, errors = bash(*argv)
    assert status == 0, out + errors
    assert out.count(": done before") == 16


def test_smoke_runs_its_row_and_reports_it(smoke):
    folder, status, out, errors = smoke
    assert status == 0, out + errors
    assert "2 of 2 cells are done" in out
    record = json.loads((run_dir(folder) / "eval.json").read_text())
    models = [entry["model"] for entry in record if entry["trained_on"] == "distilled raw"]
    assert models == ["ConvNetD1"]
    assert re.search(rf"{ROW} +distilled raw +{record[0]['acc_mean']:.2%} ", out)
    assert f"1 runs in {folder}/results.md" in out
    text = (folder / "results.md").read_text()
    assert "| digits 8x8 | 2 | ATT | ConvNetD1 | 2 | 1 | 2 | 2 of 2 epochs |" in text
    assert "Left out" not in text


def test_the_estimated_disk_is_what_the_cells_take(smoke):
    folder, *_ = smoke
    where = {"save_path": str(folder), "buffer_path": str(folder / "buffers")}
    (experts,), (row,) = (cells.values() for cells in chosen(ROW, smoke=True, **where))
    size = (experts.outputs[0] / "replay_buffer_0.pt").stat().st_size
    assert experts.estimate.disk * 1e9 == pytest.approx(size, rel=0.1)
    size = sum(path.stat().st_size for path in row.outputs[0].iterdir())
    assert size / 2 < row.estimate.disk * 1e9 < 2 * size


def test_a_run_without_a_record_is_found_done_by_its_scripts(smoke, run_all):
    """As one of before there were records: nothing is computed again, nor are its experts."""
    folder, *_ = smoke
    (folder / f"run_all/{ROW}.done").unlink()
    metrics = run_dir(folder) / "metrics.jsonl"
    before = metrics.read_text()
    status, out = run_all(*smoke_flags(folder))
    assert status == 0
    assert "experts/digits_ZCA/ConvNetD1: done before" in out
    log = (folder / f"run_all/{ROW}.log").read_text()
    again = log[log.rindex(" -> ") :]
    assert "continuing at iteration 2" in again
    assert again.count("recorded before") == 2
    assert metrics.read_text() == before


def test_data_that_are_missing_fail_their_own_cells(tmp_path, run_all):
    """A real row, not a miniature: the scripts' own error is what the summary shows."""
    where = ["--data_path", tmp_path / "none", "--buffer_path", tmp_path / "b"]
    status, out = run_all(*where, "--save_path", tmp_path / "r", "--only", "Tiny/ipc1")
    assert status == 1
    assert "0 of 2 cells are done" in out
    assert re.search(r"Tiny/ConvNetD4\.log: buffer\.py: error: .*none", out)
    assert "Tiny/ipc1: not run: experts/Tiny/ConvNetD4 failed" in out
    assert not (tmp_path / "r/Tiny").exists()
