"""Sessions on a GPU: steps end in time, what was measured is used, command lines are valid."""

import json
import math
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import buffer
import distill_att
import eval as evaluation
from scripts import bench
from scripts.gpu import __main__ as gpu
from scripts.gpu import choice, gate, steps
from scripts.gpu.choice import choose, experts_within, steps_within
from scripts.gpu.steps import CANNOT_START, Outcome, Session, Step
from utils.core.errors import UserError
from utils.experts.files import buffer_files, keep_expert, read_file

ROOT = Path(__file__).parent.parent


def shell(name, script, seconds=20.0, grace=0.2):
    return Step(name, ["bash", "-c", script], seconds, grace)


@pytest.fixture
def open_session(tmp_path, monkeypatch):
    """A session of so many seconds, in which a step may be as short as it likes."""
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.05)

    def begin(seconds=60.0, **environment):
        end = time.monotonic() + seconds
        return Session(tmp_path / "out", tmp_path / "work", end=end, environment=environment)

    return begin


def packed(session_tgz):
    with tarfile.open(session_tgz) as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive}


def is_alive(process):
    """Whether it runs; one that has ended but that nobody has asked about is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def has_ended(process):
    end = time.monotonic() + 5
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(process)


def test_a_step_beyond_its_limit_is_killed_with_its_children_and_the_next_goes_on(
    open_session, tmp_path
):
    session = open_session()
    deaf = "trap '' TERM; sleep 300 & echo $!; while true; do sleep 0.1; done"
    session.run(shell("deaf", deaf, seconds=0.5))
    session.run(shell("next", "echo said by the next"))
    cut, after = session.outcomes
    assert cut.was_cut_off and cut.status == -9 and 0.5 < cut.seconds < 5
    assert (after.status, after.was_cut_off) == (0, False)
    logs = packed(tmp_path / "out" / "session.tgz")
    assert has_ended(int(logs["deaf.log"]))
    assert logs["next.log"] == "said by the next\n"
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "cut off, exit -9" in summary and "exit 0" in summary


def test_a_step_may_end_in_order(open_session):
    session = open_session()
    saves = "trap 'echo saved; exit 7' TERM; while true; do sleep 0.05; done"
    (outcome,) = session.run(shell("saves", saves, seconds=0.5, grace=5))
    assert (outcome.status, outcome.was_cut_off) == (7, True)
    assert "saved" in (session.results / "saves.log").read_text()


def test_what_a_step_leaves_at_work_ends_with_it(open_session):
    session = open_session()
    session.run(shell("parent", "sleep 300 & echo $!"))
    assert has_ended(int((session.results / "parent.log").read_text()))


def test_side_by_side_each_step_has_its_own_limit(open_session):
    session = open_session(LANGUAGE="all")
    began = time.monotonic()
    outcomes = session.run(
        shell("long", "sleep 1; echo $LANGUAGE $MORE"),
        shell("cut", "sleep 300", seconds=0.3),
        shell("failing", "exit 3"),
        Step("absent", ["/no/such/command"], 10),
        environment={"MORE": "these"},
    )
    assert time.monotonic() - began < 10
    by_name = {outcome.name: outcome for outcome in outcomes}
    statuses = {name: outcome.status for name, outcome in by_name.items()}
    assert statuses == {"long": 0, "cut": -15, "failing": 3, "absent": CANNOT_START}
    assert [name for name, outcome in by_name.items() if outcome.was_cut_off] == ["cut"]
    assert (session.results / "long.log").read_text() == "all these\n"
    assert "/no/such/command" in (session.results / "absent.log").read_text()


def test_no_step_goes_on_beyond_the_end_of_the_session(open_session):
    session = open_session(seconds=1)
    began = time.monotonic()
    session.run(shell("long", "sleep 300", seconds=200))
    session.run(shell("late", "echo begun"))
    assert time.monotonic() - began < 5
    assert session.outcomes[0].was_cut_off and session.outcomes[0].limit <= 0.8
    assert session.outcomes[1].status is None
    assert not (session.results / "late.log").exists()


def test_an_interrupted_session_asks_its_steps_to_end_and_packs(
    open_session, tmp_path, monkeypatch
):
    session, really_sleep = open_session(), time.sleep
    saves = "trap 'echo saved; exit 7' TERM; echo ready; while true; do sleep 0.05; done"

    def interrupt_once_ready(seconds):
        really_sleep(seconds)
        if "ready" in (session.results / "saves.log").read_text():
            monkeypatch.setattr(steps.time, "sleep", really_sleep)
            raise KeyboardInterrupt

    monkeypatch.setattr(steps.time, "sleep", interrupt_once_ready)
    with pytest.raises(KeyboardInterrupt):
        session.run(shell("saves", saves, grace=5))
    assert packed(tmp_path / "out" / "session.tgz")["saves.log"].endswith("saved\n")
    assert "exit 7" in (tmp_path / "out" / "summary.txt").read_text()


def test_large_files_stay_behind_and_are_named(open_session, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MAX_BYTES", 100)
    session = open_session()
    session.run(shell("step", "exit 0"))
    (session.results / "folder").mkdir()
    (session.results / "folder" / "small").write_text("x" * 100)
    (session.results / "large").write_text("x" * 101)
    session.pack()
    assert {*packed(tmp_path / "out" / "session.tgz")} == {"step.log", "folder/small"}
    assert (
        f"too large to pack: {session.results / 'large'}"
        in (tmp_path / "out" / "summary.txt").read_text()
    )


def leave(folder, **records):
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def timed(**seconds):
    return {"results": {name: {"median_seconds": value} for name, value in seconds.items()}}


def test_without_any_result_the_choice_is_guessed_and_says_so(tmp_path):
    chosen = choose(tmp_path / "absent")
    assert chosen.flags == ()
    assert chosen.step_seconds == choice.STEP_SECONDS
    assert chosen.epoch_seconds == choice.EPOCH_SECONDS
    assert [note.rpartition(", ")[2] for note in chosen.notes[1:]] == ["guessed", "guessed"]


def test_the_first_mode_that_is_right_counts_with_its_own_times(tmp_path):
    leave(
        tmp_path,
        **{"gate_graphs+compiled": {"right": False}, "gate_graphs": {"right": True}},
        gate_plain={"right": True},
        unroll_ipc1=timed(twin=0.5, short=0.2, long=0.05),
        experts=timed(twin=4.0, short=2.0, one=1.0)
        | {"settings": {"networks": "2", "steps": "49"}},
    )
    chosen = choose(tmp_path)
    assert chosen.flags == ("--compile", "off", "--cuda_graphs", "auto")
    assert chosen.step_seconds == 0.2
    assert chosen.epoch_seconds == pytest.approx(4.0)  # 196 batches, of which 98 took 2 s
    leave(tmp_path, **{"gate_graphs+compiled": {"right": True}})
    chosen = choose(tmp_path)
    assert chosen.flags == ("--compile", "on", "--cuda_graphs", "auto")
    assert (chosen.step_seconds, chosen.epoch_seconds) == (0.05, pytest.approx(2.0))


def test_damaged_results_count_as_missing(tmp_path):
    leave(tmp_path, gate_compiled={"right": True}, unroll_variants=timed(long=1, uncaptured=0.3))
    (tmp_path / "unroll_ipc1.json").write_text('{"results": {"uncap')
    (tmp_path / "experts.json").write_text("[]")
    chosen = choose(tmp_path)
    assert chosen.flags == ("--compile", "on", "--cuda_graphs", "off")
    assert chosen.step_seconds == 0.3  # from the second benchmark that has it
    assert chosen.epoch_seconds == choice.EPOCH_SECONDS
    assert chosen.notes[1].endswith("measured") and chosen.notes[2].endswith("guessed")


@pytest.mark.parametrize(
    ("seconds", "epoch_seconds", "experts"),
    [
        (1000, 0.3, 100),  # no more than there are in the row
        (150, 0.5, 40),  # 0.95 * 120 s / 2.5 s = 45, in whole files
        (50, 0.5, 7),
        (20, 0.5, 4),  # less than starting takes: the fewest
    ],
)
def test_experts_that_fit(seconds, epoch_seconds, experts):
    assert experts_within(seconds, epoch_seconds, epochs=5, most=100) == experts


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "steps"),
    [(280, 0.1, 2375), (280, 0.01, 6000), (10, 0.1, 1)],
)
def test_steps_that_fit(seconds, step_seconds, steps):
    assert steps_within(seconds, step_seconds, most=6000) == steps


def test_experts_that_are_complete_are_put_into_files(tmp_path):
    for number in (*range(11), 12):  # 11 is missing
        keep_expert(tmp_path, number, [[torch.full((2,), float(number))]] * 2)
    assert gpu.fill(tmp_path, 20) == 11
    experts = [expert for file in buffer_files(tmp_path) for expert in read_file(file)]
    assert [expert[0][0][0].item() for expert in experts] == [*range(11)]
    assert gpu.fill(tmp_path / "absent", 4) == 0


@pytest.mark.parametrize(
    ("loss", "gradient", "right"),
    [(1e-9, 1e-9, True), (1e-9, 1e-7, False), (1e-7, 1e-9, False), (1e-9, math.nan, False)],
)
def test_the_gate_judges_loss_and_gradients_in_float64(loss, gradient, right):
    errors = {"loss": loss, "grad_images": gradient, "grad_syn_lr": 1e-9}
    assert gate.is_right({"float64": errors}) is right


def test_the_gate_judges_the_loss_alone_in_float32():
    exact = dict.fromkeys(("loss", "grad_images", "grad_syn_lr"), 0.0)
    assert gate.is_right({"float64": exact, "float32": exact | {"grad_images": 0.5}})
    assert not gate.is_right({"float64": exact, "float32": exact | {"loss": 0.5}})


@pytest.mark.parametrize("factor", [1, 1 + 1e-6, math.nan])
def test_the_gate_finds_a_wrong_step(monkeypatch, tmp_path, factor):
    """Wrong in the last outer step alone, as a replay may be."""
    match, calls = gate.match_by_adjoint, []

    def spoiled(*arguments):
        matching = match(*arguments)
        calls.append(matching)
        if len(calls) == gate.OUTER_STEPS:
            matching.grad_images.mul_(factor)
        return matching

    monkeypatch.setattr(gate, "match_by_adjoint", spoiled)
    out = tmp_path / "gate.json"
    flags = ["--model", "ConvNetD1", "--res", "8", "--syn_steps", "1"]
    status = gate.main(["plain", str(out), *flags])
    record = json.loads(out.read_text())
    assert len(calls) == 2 * gate.OUTER_STEPS
    assert record["right"] is (factor == 1) and status == (0 if factor == 1 else 1)
    assert {*record["errors"]} == {"float64", "float32"}


def test_a_gate_that_raises_is_not_right(monkeypatch, tmp_path):
    def fail(mode, **keywords):
        yield {"right": True}
        raise RuntimeError("capture failed")

    monkeypatch.setattr(gate, "check", fail)
    with pytest.raises(RuntimeError):
        gate.main(["plain", str(tmp_path / "gate.json")])
    record = json.loads((tmp_path / "gate.json").read_text())
    assert (record["right"], record["error"]) == (False, "capture failed")


class Rehearsal(Session):
    """Records the steps instead of running them; those `failing` end with status 1."""

    failing = ()

    def run(self, *steps, environment=None):
        self.steps = [*getattr(self, "steps", []), *steps]
        statuses = {step.name: int(step.name in self.failing) for step in steps}
        return [Outcome(name, 1, 100, status) for name, status in statuses.items()]

    def arguments(self, script):
        """The command lines of `script`, by the name of the step."""
        commands = {step.name: list(map(str, step.command)) for step in self.steps}
        return {
            name: command[command.index(script) + 1 :]
            for name, command in commands.items()
            if script in command
        }


def rehearse(tmp_path, what, seconds):
    end = time.monotonic() + seconds
    return Rehearsal(tmp_path / "out", tmp_path / "work" / what, end=end, environment={})


@pytest.mark.parametrize("plan", [gpu.H100, gpu.TINY], ids=["H100", "TINY"])
def test_the_benchmarks_of_a_measurement_are_known(tmp_path, plan):
    session = rehearse(tmp_path, "measure", 300)
    gpu.measure(session, plan, tmp_path / "work")
    calls = session.arguments("scripts/bench.py")
    assert len(calls) == len(plan.warm_ups) + len(plan.benches)
    outs = {bench.parse(call).out for call in calls.values()}
    assert len(outs) == len(calls)
    assert session.results / "unroll_ipc1.json" in outs
    files = [word for word in plan.tests.split() if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)
    assert {step.name for step in session.steps} >= {f"gate_{mode}" for mode in plan.modes}


def test_what_is_timed_is_what_the_choice_reads(tmp_path):
    session = rehearse(tmp_path, "measure", 300)
    gpu.measure(session, gpu.H100, tmp_path / "work")
    calls = session.arguments("scripts/bench.py")
    unrolled = {
        name
        for each in ("unroll_ipc1", "unroll_variants")
        for name in bench.parse(calls[each]).variants
    }
    trained = {*bench.parse(calls["experts"]).variants}
    assert {mode.unrolled for mode in choice.MODES.values()} <= unrolled
    assert {mode.trained for mode in choice.MODES.values()} <= trained


def test_the_row_is_the_papers_but_for_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "fill", lambda folder, count: count)
    (tmp_path / "work" / "measure").mkdir(parents=True)
    leave(
        tmp_path / "work" / "measure",
        gate_compiled={"right": True},
        unroll_variants=timed(uncaptured=0.1),
    )
    session = rehearse(tmp_path, "row", 555)
    gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data")
    names = [step.name for step in session.steps]
    assert names == ["experts", "distil", "evaluate", "evaluate_ema", "evaluate_others"]

    experts = buffer.parse(session.arguments("buffer.py")["experts"]).options
    assert (experts.dataset, experts.zca, experts.model) == ("CIFAR10", True, "ConvNetD3")
    assert (experts.train_epochs, experts.experts_at_once) == (5, 1)
    assert (experts.compile, experts.cuda_graphs) == ("on", "off")
    assert 10 <= experts.num_experts < 100  # half a second an epoch

    resolved = distill_att.parse(session.arguments("distill_att.py")["distil"])
    distil = resolved.options
    row = {
        "syn_steps": 80,
        "expert_epochs": 4,
        "max_start_epoch": 2,
        "lr_img": 100.0,
        "lr_lr": 1e-7,
        "lr_teacher": 0.01,
        "length": "att",
    }
    assert {name: getattr(distil, name) for name in row} == row
    assert distil.max_start_epoch - 1 + distil.expert_epochs <= experts.train_epochs
    assert (distil.eval_it, distil.ema_decay) == (0, 0.999)
    assert distil.save_it == distil.Iteration
    assert 3000 < distil.Iteration < 6000  # all the time is there, as nothing was run
    assert (experts.buffer_path, experts.data_path) == (distil.buffer_path, distil.data_path)

    for name, models in (("evaluate", None), ("evaluate_others", ["ResNet18", "VGG11", "AlexNet"])):
        options = evaluation.parse(session.arguments("eval.py")[name])
        assert options.distilled.endswith("/CIFAR10/ConvNetD3/ipc1/session/distilled_last.pt")
        assert options.distilled.startswith(distil.save_path)
        assert (options.model, options.compile) == (models, "off")


def test_what_fails_from_the_start_is_tried_plainly(tmp_path, monkeypatch):
    complete = iter([0, 4])
    monkeypatch.setattr(gpu, "fill", lambda folder, count: next(complete))
    session = rehearse(tmp_path, "row", 555)
    session.failing = ("distil",)
    gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data")
    names = [step.name for step in session.steps]
    assert names[:4] == ["experts", "experts_plain", "distil", "distil_plain"]
    assert names[4:] == ["evaluate", "evaluate_ema", "evaluate_others"]
    for script, name in (("buffer.py", "experts"), ("distill_att.py", "distil")):
        calls = session.arguments(script)
        options = script_options(script, calls[f"{name}_plain"])
        assert (options.compile, options.cuda_graphs) == ("off", "off")
        assert script_options(script, calls[name]).compile == "auto"


def script_options(script, argv):
    return {"buffer.py": buffer, "distill_att.py": distill_att}[script].parse(argv).options


def test_without_a_complete_expert_the_row_ends_in_one_line(tmp_path):
    session = rehearse(tmp_path, "row", 555)
    with pytest.raises(UserError, match="no expert is complete"):
        gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data")
    assert [step.name for step in session.steps] == ["experts", "experts_plain"]


def test_a_row_without_its_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        gpu.main(["row", str(tmp_path), "--work", str(tmp_path), "--data", str(tmp_path)])


@pytest.mark.slow
def test_both_calls_on_a_cpu(tmp_path):
    """The distillation is planned far too long, so that it is cut off, and its set evaluated."""
    out, work = tmp_path / "out", tmp_path / "work"

    def call(what, seconds):
        command = [sys.executable, "-m", "scripts.gpu", what, str(out / what), "--tiny"]
        command += ["--work", str(work), "--seconds", str(seconds)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 9)
        return run, packed_names(out / what / "session.tgz")

    run, files = call("measure", 280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {"gate_plain.json", "tests.xml", "unroll_ipc1.json", "choice.json"} <= files
    chosen = choose(work / "measure")
    assert chosen.flags == ("--compile", "off", "--cuda_graphs", "off")
    assert all(note.endswith("measured") for note in chosen.notes[1:]), chosen.notes

    leave(work / "measure", unroll_ipc1=timed(twin=1e-4))
    run, files = call("row", 240)
    assert run.returncode == 1, run.stdout + run.stderr
    summary = (out / "row" / "summary.txt").read_text()
    assert "cut off" in next(line for line in summary.splitlines() if line.startswith("distil "))
    assert summary.count("cut off") == 1 and summary.count("exit 0") == 5, summary
    folder = "results/digits/ConvNetD2/ipc1/session"
    assert {f"{folder}/{name}" for name in ("eval.json", "metrics.jsonl", "config.yaml")} <= files
    measured = json.loads((work / "row" / folder / "eval.json").read_text())
    assert len(measured) == 4  # raw, random, EMA, and the set on another network


def packed_names(session_tgz):
    with tarfile.open(session_tgz) as archive:
        return {*archive.getnames()}
