"""run_all.sh: the plan, the queue, and the whole of it in miniature on digits."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.plan import __main__ as plan
from scripts.plan.__main__ import Devices, Gpu
from scripts.plan.cells import RUN_NAME, Settings, choose, make_cells, table_rows
from utils.core.errors import UserError
from utils.experts.files import read_file
from utils.plan.machine import GPU

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
        env={**os.environ, **environment},
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


def test_the_plan_has_every_row_and_experts_that_rows_share():
    experts, rows = make_cells(REAL)
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
    experts, rows = choose(REAL, [], rivals=True)
    assert len(rows) == len(table_rows(rivals=True)) > 40
    assert {"CIFAR10/ipc10", "CIFAR10/ipc10/ftd", "CIFAR10/ipc10/mtt"} <= set(names(rows))
    assert {row.needs for row in rows} == set(names(experts))
    assert {e.name for e in choose(REAL, [])[0]} < {e.name for e in experts}


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
    assert names(with_rivals) == [f"CIFAR10/ipc10{m}" for m in ("", "/datm", "/ftd", "/mtt")]


def test_rivals_share_the_experts_of_att_without_making_them_longer():
    own = {cell.name: cell.commands for cell in make_cells(REAL)[0]}
    both = {cell.name: cell.commands for cell in make_cells(REAL, rivals=True)[0]}
    assert own.items() <= both.items()
    assert "--train_epochs 72" in both["experts/CIFAR100_FLAT/ConvNetD3"][0]  # DATM's late ones


def test_flags_that_do_not_suit_a_rival_do_not_hinder_att():
    early = replace(REAL, distill_flags=("--start_epochs", "0", "5"))
    assert len(choose(early, [])[1]) == 20
    with pytest.raises(UserError, match="--current_max_start_epoch 10"):
        choose(early, ["DATM"])


def test_rivals_run_in_miniature_too(tmp_path):
    where = {"save_path": str(tmp_path), "buffer_path": str(tmp_path / "b")}
    experts, rows = choose(replace(REAL, smoke=True, **where), ["CIFAR10/ipc10/datm"])
    (row,), (expert,) = rows, experts
    assert "--start_epochs 0 1" in row.commands[0]
    assert "--max_start_epoch" not in row.commands[0]
    assert expert.name == "experts/digits_ZCA_FLAT/ConvNetD1"


def test_rows_are_evaluated_on_their_own_network_and_the_others_of_table_1():
    commands = {row.name: row.commands for row in make_cells(REAL)[1]}
    for command in commands["CIFAR10/ipc1"][1:]:
        assert "--eval_mode M" in command
    for command in commands["Tiny/ipc1"][1:]:
        assert "--model ConvNetD4 ResNet18 VGG11 AlexNet" in command


@pytest.mark.parametrize(
    ("flags", "folders"),
    [
        (["--report"], ["s", "docs"]),
        (["--report", "d"], ["s", "d"]),
        (["--report", "--dry-run"], None),
    ],
)
def test_a_report_follows_where_it_is_asked_for(flags, folders, tmp_path):
    given = [*flags, "--queue", str(tmp_path), "--save_path", "s", "--only", "experts/Tiny"]
    assert plan.main(given) == 0
    report = tmp_path / "report"
    assert (report.read_text().split() if report.exists() else None) == folders


@pytest.mark.parametrize(
    ("table", "rows", "rivals"),
    [
        (1, {f"CIFAR10/ipc{k}" for k in (10, 50)}, 5),
        (2, {f"{d}/ipc{k}" for d in ("CIFAR10", "CIFAR100", "Tiny") for k in (1, 10, 50)}, 22),
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


def test_a_dry_run_prints_commands_and_costs_and_does_nothing(tmp_path, capsys):
    where = ["--save_path", str(tmp_path / "r"), "--buffer_path", str(tmp_path / "b")]
    assert plan.main(["--dry-run", "--queue", str(tmp_path), *where]) == 0
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
    step = (80 * 3 * GPU.step_seconds + 80 * 10 * 11 * 1.01e8 / GPU.rate) / 2
    longer = hours("--Iteration", "2000", "--eval_it", "0")
    shorter = hours("--Iteration", "1000", "--eval_it", "0")
    assert 3600 * (longer - shorter) == pytest.approx(1000 * step, rel=0.01)
    assert hours("--Iteration", "1000") > shorter


def test_long_runs_are_evaluated_a_hundred_times():
    _, rows = make_cells(REAL)
    commands = {row.name: row.commands[0] for row in rows}
    assert "--eval_it 10000" in commands["CIFAR10/ipc50"]
    assert "--eval_it" not in commands["CIFAR10/ipc1"]
    _, rows = make_cells(replace(REAL, distill_flags=("--eval_it", "50")))
    assert all(row.commands[0].count("--eval_it") == 1 for row in rows)


def test_slots_follow_memory_and_experts_take_all_gpus():
    experts, rows = make_cells(REAL)
    small, large = rows[0], rows[-1]
    assert 2 < small.estimate.memory < 10 < large.estimate.memory < 20
    many, one = Devices((Gpu("0", 80.0), Gpu("1", 40.0)), 4), Devices((Gpu("0", 80.0),), 4)
    assert [many.slots_for(cell) for cell in (small, large, experts[0])] == ["1", "2", "all"]
    assert [one.slots_for(cell) for cell in (small, large, experts[0])] == ["1", "1", "4"]
    assert Devices((Gpu("0", 8.0),), 4).slots_for(large) == "4"
    torchrun = ".venv/bin/torchrun --standalone --nproc_per_node 2 buffer.py "
    assert many.command_line(experts[0]).startswith(torchrun)
    assert one.command_line(experts[0]).startswith(".venv/bin/python buffer.py ")
    assert " && .venv/bin/python eval.py " in many.command_line(small)


@pytest.mark.slow
def test_the_command_for_several_gpus_trains_the_experts(tmp_path):
    where = {"save_path": str(tmp_path), "buffer_path": str(tmp_path / "b")}
    experts, _ = make_cells(replace(REAL, smoke=True, **where))
    command = Devices((Gpu("0", 80.0), Gpu("1", 80.0)), 4).command_line(experts[1])
    done = bash("-c", command)
    assert done.returncode == 0, done.stderr
    assert len(read_file(tmp_path / "b/digits/ConvNetD1/replay_buffer_0.pt")) == 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--only", "CIFAR11"], ["'CIFAR11'", "CIFAR10/ipc1", "ImageNet/imagewoof/ipc10"]),
        (["--only", "CIFAR10/ipc2"], ["'CIFAR10/ipc2'", "CIFAR10/ipc10", "experts/Tiny"]),
        (["--only", ""], ["''", "CIFAR10/ipc1"]),
        (["--only", "CIFAR10/ipc1/FTD"], ["'CIFAR10/ipc1/FTD'", "DATM, FTD, MTT, TESLA"]),
        (
            ["--onyl", "Tiny"],
            ["--onyl", "flags: -h, --only, --rivals, --dry-run, --smoke, --data_path"],
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
        plan.main(["--queue", str(tmp_path), *argv])
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
def queue(tmp_path):
    """A queue for two devices of two slots each, without cells."""
    for device in ("gpu0", "gpu1"):
        (tmp_path / "slots" / device).mkdir(parents=True)
        for slot in "01":
            (tmp_path / "slots" / device / slot).touch()
    (tmp_path / "logs").write_text(f"{tmp_path / 'logs_of_cells'}\n")
    return tmp_path


def work(queue, *lines):
    """Let four workers loose on cells given as (name, slots, needs, command); their output."""
    text = "".join("\t".join([*line[:3], "-", line[3]]) + "\n" for line in lines)
    (queue / "cells.tsv").write_text(text)
    return subprocess.run(
        ["xargs", "-d", "\n", "-n", "1", "-P", "4", "bash", "scripts/run_cell.sh", str(queue)],
        stdin=open(queue / "cells.tsv"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def events(queue, needed):
    """Let cells that need so many slots note when they start and end, and on which device."""
    note = f"echo $CUDA_VISIBLE_DEVICES {{}} >> {queue}/events"
    cells = []
    for number, slots in enumerate(needed):
        command = f"{note.format(slots)}; sleep 1; {note.format(-slots)}"
        cells.append((f"cell{number}", str(slots), "-", command))
    work(queue, *cells)
    assert all((queue / "status" / cell[0]).read_text().startswith("done") for cell in cells)
    lines = [line.split() for line in (queue / "events").read_text().splitlines()]
    return [(device, int(change)) for device, change in lines]


@pytest.mark.parametrize(("needed", "peak"), [([1] * 5, 4), ([1, 1, 2, 1, 2], 3)])
def test_cells_share_devices_as_their_slots_allow(queue, needed, peak):
    """No device is ever overfull, and none is idle while cells that fit are waiting."""
    used, most = {"gpu0": 0, "gpu1": 0}, 0
    for device, change in events(queue, needed):
        used[device] += change
        assert used[device] <= 2
        most = max(most, sum(used.values()))
    assert most >= peak


def test_cells_spread_over_the_devices(queue):
    started = [device for device, change in events(queue, [1, 1]) if change > 0]
    assert sorted(started) == ["gpu0", "gpu1"]


def test_a_cell_on_all_devices_is_alone(queue):
    command = f"echo start >> {queue}/events; sleep 0.3; echo end >> {queue}/events"
    work(queue, *((name, "all", "-", command) for name in "abc"))
    assert (queue / "events").read_text().split() == ["start", "end"] * 3


def test_a_failed_cell_stops_only_those_that_need_it(queue):
    lines = [("experts/x", "1", "-", "echo oh no; exit 3"), ("experts/y", "1", "-", "true")]
    work(queue, *lines)
    work(queue, ("x/ipc1", "1", "experts/x", "true"), ("y/ipc1", "1", "experts/y", "true"))
    status = {name: (queue / "status" / name).read_text() for name in ("x/ipc1", "y/ipc1")}
    assert status["x/ipc1"] == "not run: experts/x failed\n"
    assert status["y/ipc1"].startswith("done in 0:00:0")
    assert (queue / "status/experts/x").read_text() == "failed: exit 3\n"
    assert (queue / "logs_of_cells/experts/x.log").read_text().endswith("exit 3\noh no\n")
    assert (queue / "logs_of_cells/experts/x.status").read_text() == "failed: exit 3\n"


def test_two_calls_do_not_work_on_one_cell_at_a_time(queue):
    command = f"echo start >> {queue}/events; sleep 0.3; echo end >> {queue}/events"
    out = work(queue, *[("same", "1", "-", command)] * 2)
    assert (queue / "events").read_text().split() == ["start", "end"] * 2
    assert "waiting: another call is at it" in out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Half of the plan in miniature, of every kind: its folder and the finished call."""
    folder = tmp_path_factory.mktemp("smoke")
    argv = ["--smoke", "--save_path", folder, "--report", folder]
    for row in ("CIFAR10", "CIFAR100/ipc50", "ImageNet/ipc1"):
        argv += ["--only", row]
    return folder, bash("scripts/run_all.sh", *argv)


@pytest.mark.slow
def test_the_whole_plan_in_miniature(tmp_path):
    done = bash("scripts/run_all.sh", "--smoke", "--save_path", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 16 cells are done" in done.stdout
    assert len(list(tmp_path.glob("digits/*/*/*/eval.json"))) == 10


def test_the_smoke_run_reports_what_it_ran(smoke):
    folder, done = smoke
    assert f"5 runs in {folder}/results.md" in done.stdout
    text = (folder / "results.md").read_text()
    assert "| digits 8x8 | 1 | ATT | ConvNetD1 | 2 | 1 | 2 | 2 of 2 epochs |" in text
    assert "Left out" not in text


def run_dir(folder, row):
    (path,) = folder.glob(f"digits/*/*/run_all_{row}")
    return path


def test_smoke_runs_its_rows(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 of 9 cells are done" in done.stdout
    for row in ("CIFAR10_ipc50", "CIFAR100_ipc50", "ImageNet_imagenette_ipc1"):
        record = json.loads((run_dir(folder, row) / "eval.json").read_text())
        models = [entry["model"] for entry in record if entry["trained_on"] == "distilled raw"]
        assert models == ["ConvNetD1"]
        measured = f"{100 * record[0]['acc_mean']:.2f}"
        assert re.search(rf"{row.replace('_', '/')} +distilled raw +{measured} ", done.stdout)
    assert len(list(folder.glob("digits/*/*/*/eval.json"))) == 5
    assert len(list(folder.rglob("buffers/**/replay_buffer_0.pt"))) == 4


def test_smoke_uses_the_rows_of_the_table(smoke):
    folder, _ = smoke
    saved = torch.load(run_dir(folder, "CIFAR100_ipc50") / "distilled_last.pt", weights_only=True)
    assert (saved["config"]["batch_syn"], saved["zca"]) == (1200, True)


def test_the_estimated_disk_is_what_the_cells_take(smoke):
    folder, _ = smoke
    where = {"save_path": str(folder), "buffer_path": str(folder / "buffers")}
    experts, rows = make_cells(replace(REAL, smoke=True, **where))
    kinds = [folder / "buffers" / cell.name.removeprefix("experts/") for cell in experts]
    trained = [(kind, cell) for kind, cell in zip(kinds, experts, strict=True) if kind.exists()]
    assert len(trained) == 4
    for kind, cell in trained:
        size = (kind / "replay_buffer_0.pt").stat().st_size
        assert cell.estimate.disk * 1e9 == pytest.approx(size, rel=0.1)
    row = rows[5]  # the larger of those with ZCA; small files are dominated by their headers
    size = sum(path.stat().st_size for path in row.run_dir.iterdir())
    assert size / 2 < row.estimate.disk * 1e9 < 2 * size


def test_a_second_call_goes_on_and_failures_stay_alone(smoke):
    """One kind of experts and one run are damaged; the third row has nothing left to do."""
    folder, _ = smoke
    broken = folder / "buffers/digits/ConvNetD1/replay_buffer_0.pt"
    broken.write_bytes(b"damaged")
    (run_dir(folder, "CIFAR10_ipc10") / "checkpoint.pt").write_bytes(b"damaged")
    before = (run_dir(folder, "CIFAR10_ipc1") / "metrics.jsonl").read_text()
    done = bash("scripts/run_all.sh", "--smoke", "--save_path", folder, "--only", "CIFAR10")

    assert done.returncode == 1
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

    log = (folder / "run_all/CIFAR10/ipc1.log").read_text()
    again = log[log.rindex(" -> ") :]
    assert "continuing at iteration 2" in again
    assert again.count("recorded before") == 2
    assert (run_dir(folder, "CIFAR10_ipc1") / "metrics.jsonl").read_text() == before
    zca = (folder / "run_all/experts/digits_ZCA/ConvNetD1.log").read_text()
    assert "2 of 2 experts are in" in zca


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
