"""run_all.sh: the plan, the queue, and the whole of it in miniature on digits."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import forking
import pytest
import torch

from scripts.plan import __main__ as plan
from scripts.plan import cells as planned
from scripts.plan import devices
from scripts.plan.cells import RUN_NAME, Cell, Settings, choose, make_cells, table_rows
from scripts.plan.devices import PYTHON, Devices, Gpu
from scripts.plan.estimate import Estimate
from scripts.plan.finished import inputs_of, record_finished
from scripts.plan.queue import Queue, run_plan
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


def bash(*arguments, **environment):
    """Call a script as a user does; `environment` joins that of the tests."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("run_all.sh would install .venv first: run the tests by scripts/test.sh")
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=ROOT,
        env=forking.environment(**environment),
        capture_output=True,
        text=True,
        timeout=900,
    )


def costs(name, table):
    """The columns of the lines of a plan whose name matches."""
    found = re.findall(rf"^{name}{COSTS}", table, re.MULTILINE)
    return [tuple(float(value.replace(",", "")) for value in line) for line in found]


def names(cells):
    return [cell.name for cell in cells]


@cache
def real_cells(*, rivals=False):
    """Those of the table; made once, for resolving every command takes seconds."""
    return make_cells(REAL, rivals=rivals)


def test_the_plan_has_every_row_and_experts_that_rows_share():
    experts, rows = real_cells()
    table = [f"{name}/ipc{k}" for name in ("CIFAR10", "CIFAR100") for k in (1, 10, 50)]
    table += [f"Tiny/ipc{k}" for k in (1, 10)]
    assert names(rows)[:8] == table
    assert len(rows) == 8 + 6 * 2
    assert len(experts) == 5 + 6
    needs = {row.name: row.needs for row in rows}
    assert needs["CIFAR10/ipc1"] == needs["CIFAR10/ipc10"] == "experts/CIFAR10/ConvNetD3"
    assert needs["CIFAR10/ipc50"] == "experts/CIFAR10_NO_ZCA/ConvNetD3"
    assert set(needs.values()) == set(names(experts))


def test_experts_are_long_enough_for_all_their_rows():
    flags = ("--max_start_epoch", "70")
    experts, _ = make_cells(replace(REAL, distill_flags=flags))
    by_name = {cell.name: cell.commands[0] for cell in experts}
    assert "--train_epochs 74" in by_name["experts/CIFAR10/ConvNetD3"]  # N_T 4 of the IPC 1 row
    assert "--train_epochs 72" in by_name["experts/Tiny/ConvNetD4"]


@pytest.mark.parametrize(
    ("only", "rows", "experts"),
    [
        ("CIFAR10/ipc1", ["CIFAR10/ipc1"], ["experts/CIFAR10/ConvNetD3"]),
        ("Tiny", ["Tiny/ipc1", "Tiny/ipc10"], ["experts/Tiny/ConvNetD4"]),
        (
            "ImageNet/imagenette/ipc10",
            ["ImageNet/imagenette/ipc10"],
            ["experts/ImageNet/imagenette/128/ConvNetD5"],
        ),
        ("experts/CIFAR100_NO_ZCA", [], ["experts/CIFAR100_NO_ZCA/ConvNetD3"]),
    ],
)
def test_only_selects_rows_with_their_experts(only, rows, experts):
    chosen_experts, chosen_rows = choose(REAL, [only])
    assert (names(chosen_rows), names(chosen_experts)) == (rows, experts)


def test_parts_of_names_select_too():
    experts, rows = choose(REAL, ["ipc1", "CIFAR10/ipc10"])
    assert len(rows) == 3 + 6 + 1
    assert all(name.endswith("/ipc1") or name == "CIFAR10/ipc10" for name in names(rows))
    assert len(experts) == 3 + 6  # no rows without ZCA among them


def test_rivals_have_rows_when_they_are_asked_for():
    assert not any(row.method for row in table_rows())
    experts, rows = real_cells(rivals=True)
    assert len(rows) == len(table_rows(rivals=True)) > 40
    assert {"CIFAR10/ipc10", "CIFAR10/ipc10/ftd", "CIFAR10/ipc10/mtt"} <= set(names(rows))
    assert {row.needs for row in rows if row.needs} == set(names(experts))
    assert {row.name for row in rows if not row.needs} == {
        row.name for row in rows if row.name.endswith("/dm")
    }
    assert {e.name for e in real_cells()[0]} < {e.name for e in experts}


@pytest.mark.parametrize("only", ["FTD", "CIFAR10/ipc10/ftd"])
def test_a_selector_that_names_a_rival_selects_its_rows(only):
    experts, rows = choose(REAL, [only])
    both = "CIFAR10" not in only
    assert names(rows) == ["CIFAR10/ipc10/ftd", "CIFAR100/ipc10/ftd"][: 1 + both]
    flat = ["experts/CIFAR10_FLAT/ConvNetD3", "experts/CIFAR100_FLAT/ConvNetD3"]
    assert names(experts) == flat[: 1 + both]
    assert all("--flat" in cell.commands[0] for cell in experts)
    command, best, ema = rows[0].commands
    assert "--config configs/CIFAR10/ipc10_ftd.yaml" in command
    assert rows[0].run_dir == Path("results/CIFAR10/ConvNetD3/ipc10/run_all_ftd")
    assert str(rows[0].run_dir / "distilled_best.pt") in best and "--random" in best
    assert str(rows[0].run_dir / "distilled_ema_best.pt") in ema


def test_a_selector_means_the_rows_of_att_where_there_are_such():
    assert names(choose(REAL, ["CIFAR10/ipc10"])[1]) == ["CIFAR10/ipc10"]
    experts, rows = choose(REAL, ["CIFAR10/ipc1", "MTT", "experts/Tiny"])
    assert names(rows)[:2] == ["CIFAR10/ipc1", "CIFAR10/ipc1/mtt"]
    assert [row for row in names(rows) if not row.endswith("/mtt")] == ["CIFAR10/ipc1"]
    assert "experts/Tiny/ConvNetD4" in names(experts)
    assert not any("FLAT" in name for name in names(experts))
    assert names(choose(REAL, ["Tiny/ipc50"])[1]) == ["Tiny/ipc50/datm", "Tiny/ipc50/mtt"]
    with_rivals = choose(REAL, ["CIFAR10/ipc10"], rivals=True)[1]
    assert names(with_rivals) == [f"CIFAR10/ipc10{m}" for m in ("", "/datm", "/dm", "/ftd", "/mtt")]


def test_rivals_share_the_experts_of_att_without_making_them_longer():
    own = {cell.name: cell.commands for cell in real_cells()[0]}
    both = {cell.name: cell.commands for cell in real_cells(rivals=True)[0]}
    assert own.items() <= both.items()
    assert "--train_epochs 72" in both["experts/CIFAR100_FLAT/ConvNetD3"][0]  # DATM's late ones


def test_flags_that_do_not_suit_a_rival_do_not_hinder_att():
    early = replace(REAL, distill_flags=("--start_epochs", "0", "5"))
    assert len(choose(early, [])[1]) == 20
    with pytest.raises(UserError, match="--start_epochs is no setting of --method dm"):
        choose(early, ["DATM"])


def test_rivals_run_in_miniature_too(tmp_path):
    where = {"save_path": str(tmp_path), "buffer_path": str(tmp_path / "b")}
    experts, rows = choose(replace(REAL, smoke=True, **where), ["CIFAR10/ipc10/datm"])
    (row,), (expert,) = rows, experts
    assert "--start_epochs 0 1" in row.commands[0]
    assert "--max_start_epoch" not in row.commands[0]
    assert expert.name == "experts/digits_ZCA_FLAT/ConvNetD1"


def test_rows_are_evaluated_on_their_own_network_and_the_others_of_table_1():
    commands = {row.name: row.commands for row in real_cells()[1]}
    for command in commands["CIFAR10/ipc1"][1:]:
        assert "--eval_mode M" in command
    for command in commands["Tiny/ipc1"][1:]:
        assert "--model ConvNetD4 ResNet18 VGG11 AlexNet" in command


@pytest.mark.parametrize(
    ("table", "rows", "rivals"),
    [
        (1, {f"CIFAR10/ipc{k}" for k in (10, 50)}, 7),
        (2, {f"{d}/ipc{k}" for d in ("CIFAR10", "CIFAR100", "Tiny") for k in (1, 10, 50)}, 30),
        (
            3,
            {f"ImageNet/image{s}/ipc{k}" for s in "nette woof fruit meow".split() for k in (1, 10)},
            8,
        ),
    ],
)
def test_a_script_of_a_table_runs_its_rows(table, rows, rivals):
    rows -= {"Tiny/ipc50"}
    script = (ROOT / f"scripts/run_table{table}.sh").read_text()
    only = re.findall(r"--only (\S+)", script)
    assert "--report" in script and script.rstrip().endswith('"$@"')
    assert set(names(choose(REAL, only)[1])) == rows
    assert len(choose(REAL, only, rivals=True)[1]) == len(rows) + rivals


@pytest.mark.parametrize("flags", [["--dry-run", "--run", "--report"], ["--dry-run"]])
def test_a_dry_run_prints_commands_and_costs_and_does_nothing(flags, tmp_path, capsys):
    where = ["--save_path", str(tmp_path / "r"), "--buffer_path", str(tmp_path / "b")]
    assert plan.main([*flags, *where]) == 0
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


def test_runs_of_another_name_are_other_cells_with_the_same_experts():
    flags = ("--length", "fixed")
    settings = replace(REAL, run_name="fixed", distill_flags=flags)
    _, (row,) = choose(settings, ["CIFAR10/ipc1"])
    assert row.name == "CIFAR10/ipc1/fixed"
    assert row.needs == "experts/CIFAR10/ConvNetD3"
    assert row.run_dir == Path("results/CIFAR10/ConvNetD3/ipc1/fixed")
    assert "--length fixed" in row.commands[0]


def test_hours_grow_with_the_steps():
    def hours(*flags):
        _, rows = make_cells(replace(REAL, distill_flags=flags))
        return rows[0].estimate.hours

    # seconds, compiled: 80 steps on ten images are bound by launching kernels
    step = (80 * 3 * A100.speed.step_seconds + 80 * 10 * 11 * 1.01e8 / A100.speed.rate) / 2
    longer = hours("--Iteration", "2000", "--eval_it", "0")
    shorter = hours("--Iteration", "1000", "--eval_it", "0")
    assert 3600 * (longer - shorter) == pytest.approx(1000 * step, rel=0.01)
    assert hours("--Iteration", "1000") > shorter


def test_long_runs_are_evaluated_a_hundred_times():
    _, rows = real_cells()
    commands = {row.name: row.commands[0] for row in rows}
    assert "--eval_it 10000" in commands["CIFAR10/ipc50"]
    assert "--eval_it" not in commands["CIFAR10/ipc1"]
    _, rows = make_cells(replace(REAL, distill_flags=("--eval_it", "50")))
    assert all(row.commands[0].count("--eval_it") == 1 for row in rows)


def test_slots_follow_memory_and_experts_take_all_gpus():
    experts, rows = real_cells()
    small, large = rows[0], rows[-1]
    assert 2 < small.estimate.memory < 10 < large.estimate.memory < 20
    many, one = Devices((Gpu("0", 80.0), Gpu("1", 40.0)), 4), Devices((Gpu("0", 80.0),), 4)
    assert [many.slots_for(cell) for cell in (small, large, experts[0])] == [1, 2, 8]
    assert [one.slots_for(cell) for cell in (small, large, experts[0])] == [1, 1, 4]
    assert Devices((Gpu("0", 8.0),), 4).slots_for(large) == 4
    torchrun = ".venv/bin/torchrun --standalone --nproc_per_node 2 buffer.py "
    assert many.command_lines(experts[0])[0].startswith(torchrun)
    assert one.command_lines(experts[0])[0].startswith(".venv/bin/python buffer.py ")
    assert many.command_lines(small)[1].startswith(".venv/bin/python eval.py ")


def test_a_row_may_need_no_experts(monkeypatch):
    monkeypatch.setattr(planned, "needs_experts", lambda options: options.dataset != "Tiny")
    experts, rows = choose(REAL, ["Tiny", "CIFAR10/ipc1"])
    assert names(experts) == ["experts/CIFAR10/ConvNetD3"]
    assert [row.needs for row in rows] == ["experts/CIFAR10/ConvNetD3", None, None]


@pytest.mark.slow
def test_the_command_for_several_gpus_trains_the_experts(tmp_path):
    where = {"save_path": str(tmp_path), "buffer_path": str(tmp_path / "b")}
    experts, _ = make_cells(replace(REAL, smoke=True, **where))
    (command,) = Devices((Gpu("0", 80.0), Gpu("1", 80.0)), 4).command_lines(experts[1])
    done = bash("-c", command)
    assert done.returncode == 0, done.stderr
    assert len(read_file(tmp_path / "b/digits/ConvNetD1/replay_buffer_0.pt")) == 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--only", "CIFAR11"], ["'CIFAR11'", "CIFAR10/ipc1", "ImageNet/imagewoof/ipc10"]),
        (["--only", "CIFAR10/ipc2"], ["'CIFAR10/ipc2'", "CIFAR10/ipc10", "experts/Tiny"]),
        (["--only", ""], ["''", "CIFAR10/ipc1"]),
        (["--only", "CIFAR10/ipc1/FTD"], ["'CIFAR10/ipc1/FTD'", "DATM, DM, FTD, MTT, TESLA"]),
        (
            ["--onyl", "Tiny"],
            ["--onyl", "flags: --help, --only, --rivals, --dry-run, --smoke, --data_path"],
        ),
        (["Tiny"], ["Tiny", "--only"]),
        (["--list", "cells"], ["cells", "rows", "experts"]),
        (["--run_name", "a/b"], ["--run_name", "a/b"]),
        (["--", "--lenght", "fixed"], ["--lenght"]),
        (["--", "--length", "long"], ["--length", "'long'", "fixed"]),
        (["--", "--dataset", "Tiny"], ["--dataset", "--only"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(argv, parts, tmp_path):
    with pytest.raises(UserError) as error:
        plan.main(["--run", "--save_path", str(tmp_path / "r"), *argv])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    for part in parts:
        assert part in str(error.value)


def test_bad_input_as_a_user_sees_it(tmp_path):
    done = bash("scripts/run_all.sh", "--save_path", tmp_path, "--only", "CIFAR11")
    assert done.returncode == 2
    assert "GPU hours" not in done.stdout
    said = r"run_all\.sh: error: --only 'CIFAR11'.*CIFAR100/ipc50.*\n"
    assert re.fullmatch(said, done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_task_of_the_job_array_is_one_cell(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    array = ["scripts/slurm/array.sbatch", "rows", "--run_name", "x", "--dry-run"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = bash(*array, SLURM_ARRAY_TASK_ID="6", PATH=path)
    assert done.returncode == 0, done.stderr
    assert len(costs("Tiny/ipc1/x", done.stdout)) == 1
    assert len(costs("2 in all", done.stdout)) == 1  # itself and its experts
    assert "ConvNetD4/ipc1/x/distilled_best.pt" in done.stdout


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Work on cells with two GPUs of two slots, 1 GB each; the statuses by name."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(devices, "TORCHRUN", f"{PYTHON} -X")  # which ignores the number behind it

    def work(*phases):
        queue = Queue(Devices((Gpu("gpu0", 2.0), Gpu("gpu1", 2.0)), 2), tmp_path / "logs")
        for cells in phases:
            queue.work(cells)
        return {name: outcome.status for name, outcome in queue.outcomes.items()}

    return work


def cell(name, *codes, gb=1.0, **fields):
    """A cell whose commands are pieces of Python."""
    commands = tuple(shlex.join(["-S", "-c", code]) for code in codes)
    return Cell(name, "", commands, Estimate(0.0, gb, 0.0), **fields)


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
    used, most = {"gpu0": 0, "gpu1": 0}, 0
    for device, change in noted(events):
        used[device] += change
        assert used[device] <= 2
        most = max(most, sum(used.values()))
    assert most >= peak
    started = re.findall(r"started on device (\w+)", capsys.readouterr().out)
    assert set(started[:2]) == {"gpu0", "gpu1"}  # spread


def test_a_cell_on_all_devices_is_alone(call, tmp_path):
    code = noting(tmp_path / "events", seconds=0.3)
    call([cell(name, code, is_experts=True) for name in "abc"])
    assert noted(tmp_path / "events") == [("gpu0,gpu1", 1), ("gpu0,gpu1", -1)] * 3


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
            assert _wait_for(tmp_path / "ran")
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
    assert noted(events) == ([] if finishes else [("gpu0", 1), ("gpu0", -1)])
    assert status["same"].startswith("done before" if finishes else "done in")


def _wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()


@pytest.fixture
def usual_signals():
    """A shell lets its background jobs ignore SIGINT, and so the tests, where they are such."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "received"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, 15)],
)
def test_a_signal_lets_running_commands_save_and_ends_the_queue(
    call, tmp_path, usual_signals, number, received
):
    ready, saved, events = tmp_path / "ready", tmp_path / "saved", tmp_path / "events"
    saves = f"lambda n, f: (open({str(saved)!r}, 'a').write(f'{{n}} '), sys.exit(128 + n))"
    code = f"import signal, sys, time; s = {saves}; [signal.signal(n, s) for n in (2, 15)]; "
    code += f"open({str(ready)!r}, 'w'); time.sleep(60)"
    strike = threading.Thread(target=lambda: _wait_for(ready) and os.kill(os.getpid(), number))
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


CHANGES = {
    "a file damaged in place": lambda c, folder: _overwrite(folder / "out/set", b"damaged!"),
    "a file deleted": lambda c, folder: (folder / "out/set").unlink(),
    "a file more": lambda c, folder: (folder / "out/more").touch(),
    "everything deleted": lambda c, folder: [file.unlink() for file in folder.glob("out/*")],
    "other data": lambda c, folder: (folder / "data/images").write_text("other"),
    "a damaged record": lambda c, folder: (folder / "logs/a/b.done").write_text("{"),
    "another YAML": lambda c, folder: replace(c, options=(BufferOptions(num_experts=3),)),
    "another command": lambda c, folder: replace(c, commands=(c.commands[0] + " --more",)),
    "an evaluation more": lambda c, folder: replace(c, commands=c.commands * 2),
}


def _overwrite(path, content):
    with open(path, "r+b") as file:
        file.write(content)


@pytest.fixture
def finished(call, tmp_path):
    """A cell that is done and recorded, with an output and data of eight bytes."""
    for name in ("out", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / {"out": "set", "data": "images"}[name]).write_bytes(b"as it is")
    done = cell(
        "a/b",
        noting(tmp_path / "events"),
        options=(BufferOptions(num_experts=2),),
        outputs=(tmp_path / "out",),
        inputs=(tmp_path / "data",),
    )
    assert call([done])["a/b"].startswith("done in")
    (tmp_path / "events").unlink()
    return done


def test_a_finished_cell_is_not_run_again(call, finished, tmp_path, capfd):
    status = (tmp_path / "logs/a/b.status").read_text()
    (tmp_path / "out/.lock").touch()  # hidden files do not count
    row = cell("row", "", needs="a/b")
    assert call([finished], [row])["a/b"] == "done before"
    assert not (tmp_path / "events").exists()
    assert "a/b: done before" in capfd.readouterr().out
    assert (tmp_path / "logs/a/b.status").read_text() == status


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_cell_is_run_again_after(call, finished, tmp_path, change):
    changed = CHANGES[change](finished, tmp_path)
    changed = changed if isinstance(changed, Cell) else finished
    assert call([changed])["a/b"].startswith("done in")
    assert noted(tmp_path / "events")
    if any((tmp_path / "out").iterdir()):  # else there is nothing to record
        assert call([changed])["a/b"] == "done before"


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


def test_the_experts_of_a_row_are_among_what_it_reads():
    (expert,), (row,) = choose(REAL, ["CIFAR10/ipc1"])
    assert expert.outputs == (Path("buffers/CIFAR10/ConvNetD3"),)
    assert set(row.inputs) == {Path("data"), *expert.outputs}
    assert [dataclasses.asdict(each)["dataset"] for each in row.options[:1]] == ["CIFAR10"]
    assert len(row.options) == len(row.commands) == 3


def outcome(name, run_dir, status="done in 0:00:01"):
    return Outcome(cell(name, "", outputs=(run_dir,)), status, "command", run_dir / "log")


def evaluated(model, *accs):
    return {
        "trained_on": "distilled raw",
        "model": model,
        "num_eval": len(accs),
        "accs": accs,
        "acc_mean": sum(accs) / len(accs),
        "acc_std": 0.01,
    }


def test_the_summary_shows_the_accuracies_of_rows_that_are_done(tmp_path, capsys):
    record = [evaluated("A", 0.1), evaluated("B", 0.5), evaluated("A", 0.2, 0.4)]
    (tmp_path / "eval.json").write_text(json.dumps(record))
    rows = [outcome("x", tmp_path), outcome("y", tmp_path, "not run: experts failed")]
    assert say_outcomes(rows) == 1
    head, line, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["test", "accuracy", "trained", "on", "A", "B"]
    assert re.fullmatch(r"x +distilled raw +30\.00% ± 10\.00% \(n=2\) +50\.00% \(n=1\)", line)
    assert rest == ["", "1 of 2 cells are done", "y: not run: experts failed"]


@pytest.mark.parametrize("damaged", ["[{", "{}", '[{"accs": []}]', "[" * 100_000])
def test_the_summary_names_evaluations_that_cannot_be_read(tmp_path, capsys, damaged):
    for name in "xy":
        (tmp_path / name).mkdir()
    (tmp_path / "x/eval.json").write_text(damaged)
    (tmp_path / "y/eval.json").write_text(json.dumps([evaluated("A", 0.5)]))
    assert say_outcomes([outcome(name, tmp_path / name) for name in "xy"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^x: .*x/eval\.json cannot be read as a list of evaluations", out, re.M)
    assert re.search(r"^y +distilled raw +50\.00%", out, re.M)


def run_dir(folder, row):
    (path,) = folder.glob(f"digits/*/*/run_all_{row}")
    return path


def smoke_call(folder, *only):
    argv = ["scripts/run_all.sh", "--smoke", "--save_path", folder, "--report", folder]
    return [*map(str, argv), *(word for row in only for word in ("--only", row))]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Three rows in miniature with two kinds of experts, by a call that was interrupted at once and
    the same call again: their folder and the finished call.
    """
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("run_all.sh would install .venv first: run the tests by scripts/test.sh")
    folder = tmp_path_factory.mktemp("smoke")
    argv = smoke_call(folder, "CIFAR10")
    with subprocess.Popen(["bash", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        while " started on " not in (line := first.stdout.readline()):
            assert line, "the first call has ended"
        first.send_signal(signal.SIGTERM)
        said = first.stdout.read()
    assert first.returncode == 143
    assert said.endswith("interrupted: the same command goes on from here\n")
    statuses = [path.read_text() for path in folder.glob("run_all/experts/*/*.status")]
    assert set(statuses) == {"interrupted\n"}
    return folder, bash(*argv)


@pytest.mark.slow
def test_the_whole_plan_in_miniature(tmp_path):
    done = bash("scripts/run_all.sh", "--smoke", "--save_path", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 16 cells are done" in done.stdout
    assert len(list(tmp_path.glob("digits/*/*/*/eval.json"))) == 10
    saved = torch.load(run_dir(tmp_path, "CIFAR100_ipc50") / "distilled_last.pt", weights_only=True)
    assert (saved["config"]["batch_syn"], saved["zca"]) == (1200, True)
    again = bash("scripts/run_all.sh", "--smoke", "--save_path", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count(": done before") == 16


def test_smoke_runs_its_rows_and_reports_them(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 cells are done" in done.stdout
    for row in ("CIFAR10_ipc1", "CIFAR10_ipc10", "CIFAR10_ipc50"):
        record = json.loads((run_dir(folder, row) / "eval.json").read_text())
        models = [entry["model"] for entry in record if entry["trained_on"] == "distilled raw"]
        assert models == ["ConvNetD1"]
        measured = f"{record[0]['acc_mean']:.2%}"
        assert re.search(rf"{row.replace('_', '/')} +distilled raw +{measured} ", done.stdout)
    assert len(list(folder.glob("digits/*/*/*/eval.json"))) == 3
    assert len(list(folder.rglob("buffers/**/replay_buffer_0.pt"))) == 2
    assert f"3 runs in {folder}/results.md" in done.stdout
    text = (folder / "results.md").read_text()
    assert "| digits 8x8 | 1 | ATT | ConvNetD1 | 2 | 1 | 2 | 2 of 2 epochs |" in text
    assert "Left out" not in text


def test_the_estimated_disk_is_what_the_cells_take(smoke):
    folder, _ = smoke
    where = {"save_path": str(folder), "buffer_path": str(folder / "buffers")}
    experts, rows = choose(replace(REAL, smoke=True, **where), ["CIFAR10"])
    for cell in experts:
        size = (cell.outputs[0] / "replay_buffer_0.pt").stat().st_size
        assert cell.estimate.disk * 1e9 == pytest.approx(size, rel=0.1)
    row = rows[1]  # the larger of those with ZCA; small files are dominated by their headers
    size = sum(path.stat().st_size for path in row.run_dir.iterdir())
    assert size / 2 < row.estimate.disk * 1e9 < 2 * size


def test_a_further_call_runs_what_has_changed_and_failures_stay_alone(smoke):
    """One kind of experts and one run are damaged; of the rest nothing is started."""
    folder, _ = smoke
    (folder / "buffers/digits/ConvNetD1/replay_buffer_0.pt").write_bytes(b"damaged")
    (run_dir(folder, "CIFAR10_ipc10") / "checkpoint.pt").write_bytes(b"damaged")
    log = (folder / "run_all/CIFAR10/ipc1.log").read_text()
    done = bash(*smoke_call(folder, "CIFAR10"))

    assert done.returncode == 1
    assert "experts/digits_ZCA/ConvNetD1: done before" in done.stdout
    assert "CIFAR10/ipc1: done before" in done.stdout
    assert (folder / "run_all/CIFAR10/ipc1.log").read_text() == log
    summary = done.stdout[done.stdout.index("cells are done") - 10 :]
    assert "2 of 5 cells are done" in summary
    assert "experts/digits/ConvNetD1: failed: exit 2" in summary
    assert re.search(
        r"ConvNetD1\.log: buffer\.py: error: .*replay_buffer_0\.pt is damaged", summary
    )
    assert "CIFAR10/ipc50: not run: experts/digits/ConvNetD1 failed" in summary
    assert "CIFAR10/ipc10: failed: exit 2" in summary
    assert re.search(r"ipc10\.log: distill_att\.py: error: .*checkpoint\.pt is damaged", summary)
    assert re.search(r"command: \S+python distill_att\.py .*CIFAR10_ipc10", summary)


def test_a_run_without_a_record_is_found_done_by_its_scripts(smoke, monkeypatch):
    """As one of before there were records: nothing is computed again."""
    for name, value in forking.environment().items():
        monkeypatch.setenv(name, value)
    folder, _ = smoke
    (folder / "run_all/CIFAR10/ipc1.done").unlink()
    metrics = run_dir(folder, "CIFAR10_ipc1") / "metrics.jsonl"
    before = metrics.read_text()
    where = {"save_path": str(folder), "buffer_path": str(folder / "buffers")}
    _, (row,) = choose(replace(REAL, smoke=True, **where), ["CIFAR10/ipc1"])
    assert run_plan([], [replace(row, needs=None)], Devices((), 1), folder / "run_all") == 0
    log = (folder / "run_all/CIFAR10/ipc1.log").read_text()
    again = log[log.rindex(" -> ") :]
    assert "continuing at iteration 2" in again
    assert again.count("recorded before") == 2
    assert metrics.read_text() == before


def test_data_that_are_missing_fail_their_own_cells(tmp_path):
    """A real row, not a miniature: the scripts' own error is what the summary shows."""
    where = ["--data_path", tmp_path / "none", "--buffer_path", tmp_path / "b"]
    where += ["--save_path", tmp_path / "r", "--only", "Tiny/ipc1"]
    done = bash("scripts/run_all.sh", *where)
    assert done.returncode == 1
    assert "0 of 2 cells are done" in done.stdout
    assert re.search(r"Tiny/ConvNetD4\.log: buffer\.py: error: .*none", done.stdout)
    assert "Tiny/ipc1: not run: experts/Tiny/ConvNetD4 failed" in done.stdout
    assert not (tmp_path / "r/Tiny").exists()
