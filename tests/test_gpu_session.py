"""Sessions on a GPU: steps end in time, what was measured is used, command lines are valid."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import buffer
import distill_att
import eval as evaluation
from scripts import bench
from scripts.gpu import __main__ as gpu
from scripts.gpu import choice, steps
from scripts.gpu.choice import choose, experts_within, is_right
from scripts.gpu.steps import CANNOT_START, Outcome, Session, Step
from scripts.plan.queue import handled_by
from utils.core.errors import UserError
from utils.experts.files import buffer_files, keep_expert, read_file

ROOT = Path(__file__).parent.parent
PARSERS = {
    "buffer.py": buffer.parse,
    "distill_att.py": distill_att.parse,
    "eval.py": evaluation.parse,
    "scripts/bench.py": bench.parse,
}
ERRORS = [f"{name}_error" for name in bench.COMPARED]


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
        return {member.name: archive.extractfile(member).read() for member in archive}


def has_ended(process):
    """Whether it ends soon; one that has ended but that nobody has asked about counts as ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        end = time.monotonic() + 5
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
    return True


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
    assert logs["next.log"] == b"said by the next\n"
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "cut off, exit -9" in summary and "exit 0" in summary


def test_side_by_side_each_step_has_its_own_limit_and_may_end_in_order(open_session):
    session = open_session(LANGUAGE="all")
    began = time.monotonic()
    saves = "trap 'echo saved; exit 7' TERM; while true; do sleep 0.05; done"
    outcomes = session.run(
        shell("long", "sleep 1; echo $LANGUAGE $MORE"),
        shell("cut", "sleep 300", seconds=0.3),
        shell("saves", saves, seconds=0.5, grace=5),
        shell("failing", "exit 3"),
        Step("absent", ["/no/such/command"], 10),
        environment={"MORE": "these"},
    )
    assert time.monotonic() - began < 10
    statuses = {outcome.name: outcome.status for outcome in outcomes}
    ends = {"long": 0, "cut": -15, "saves": 7, "failing": 3, "absent": CANNOT_START}
    assert statuses == ends
    assert {outcome.name for outcome in outcomes if outcome.was_cut_off} == {"cut", "saves"}
    logs = {name: (session.results / f"{name}.log").read_text() for name in ends}
    assert logs["long"] == "all these\n" and logs["saves"].endswith("saved\n")
    assert "/no/such/command" in logs["absent"]


def test_so_many_at_once_and_each_ends_before_what_is_kept(open_session):
    session = open_session(seconds=4)
    began = time.monotonic()
    steps = [shell(name, "sleep 1", seconds=math.inf) for name in ("first", "second")]
    outcomes = session.run(*steps, shell("late", "sleep 300"), at_once=1, keep=1)
    assert [outcome.was_cut_off for outcome in outcomes] == [False, False, True]
    assert outcomes[0].limit == pytest.approx(2.8, abs=0.3)
    assert outcomes[1].limit == pytest.approx(1.8, abs=0.5)
    assert time.monotonic() - began < 3.5


def test_what_a_step_leaves_at_work_ends_with_it(open_session):
    session = open_session()
    session.run(shell("parent", "sleep 300 & echo $!"))
    assert has_ended(int((session.results / "parent.log").read_text()))


def test_no_step_goes_on_beyond_the_end_of_the_session(open_session):
    session = open_session(seconds=1)
    began = time.monotonic()
    session.run(shell("long", "sleep 300", seconds=200))
    session.run(shell("late", "echo begun"))
    assert time.monotonic() - began < 5
    assert session.outcomes[0].was_cut_off and session.outcomes[0].limit <= 0.8
    assert session.outcomes[1].status is None
    assert not (session.results / "late.log").exists()


@pytest.mark.parametrize("busy", [False, True])
def test_an_interrupted_session_asks_its_steps_to_end_and_packs(
    open_session, tmp_path, monkeypatch, busy
):
    session, start = open_session(), threading.Thread.start
    if busy:  # the step runs before whoever begins it knows

        def late(thread):
            start(thread)
            time.sleep(1)

        monkeypatch.setattr(threading.Thread, "start", late)
    saves = "trap 'echo saved; exit 7' TERM; kill -TERM %d; while true; do sleep 0.05; done"
    with pytest.raises(KeyboardInterrupt), handled_by(signal.default_int_handler):
        session.run(shell("saves", saves % os.getpid(), grace=5))
    assert packed(tmp_path / "out" / "session.tgz")["saves.log"].endswith(b"saved\n")
    assert "exit 7" in (tmp_path / "out" / "summary.txt").read_text()


def test_large_files_stay_behind_and_are_named(open_session, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MAX_BYTES", 100)
    session = open_session()
    (session.results / "folder").mkdir()
    (session.results / "folder" / "small").write_text("x" * 100)
    (session.results / "large").write_text("x" * 101)
    session.run(shell("step", "exit 0"))
    assert {*packed(tmp_path / "out" / "session.tgz")} == {"step.log", "folder/small"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert f"too large to pack: {session.results / 'large'}" in summary


def leave(folder, **records):
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def timed(**seconds):
    return {"results": {name: {"median_seconds": value} for name, value in seconds.items()}}


def passed(*modes, baseline="twin", **errors):
    """What the gates of `modes` leave."""
    row = {"baseline": baseline, **dict.fromkeys(ERRORS, 1e-9), **errors}
    return {f"gate_{mode}": {"results": {choice.MODES[mode].unrolled: row}} for mode in modes}


def test_without_any_result_the_choice_is_guessed_and_says_so(tmp_path):
    chosen = choose(tmp_path / "absent")
    assert chosen.flags == []
    assert chosen.step_seconds == choice.STEP_SECONDS
    assert chosen.epoch_seconds == choice.EPOCH_SECONDS
    assert [note.rpartition(", ")[2] for note in chosen.notes[1:]] == ["guessed", "guessed"]


def test_the_first_mode_that_is_right_counts_with_its_own_times(tmp_path):
    leave(
        tmp_path,
        **passed("graphs+compiled", loss_error=1e-7),
        **passed("graphs", "plain"),
        unroll_ipc1=timed(twin=0.5, short=0.2, long=0.05),
        experts=timed(twin=4.0, short=2.0, one=1.0)
        | {"settings": {"networks": "2", "steps": "49"}},
    )
    chosen = choose(tmp_path)
    assert chosen.flags == ["--compile", "off", "--cuda_graphs", "auto"]
    assert chosen.step_seconds == 0.2
    assert chosen.epoch_seconds == pytest.approx(4.0)  # 196 batches, of which 98 took 2 s
    leave(tmp_path, **passed("graphs+compiled"))
    chosen = choose(tmp_path)
    assert chosen.flags == ["--compile", "on", "--cuda_graphs", "auto"]
    assert (chosen.step_seconds, chosen.epoch_seconds) == (0.05, pytest.approx(2.0))


def test_damaged_results_count_as_missing(tmp_path):
    leave(tmp_path, **passed("compiled"), unroll_variants=timed(long=1, uncaptured=0.3))
    (tmp_path / "unroll_ipc1.json").write_text('{"results": {"uncap')
    (tmp_path / "experts.json").write_text("[]")
    chosen = choose(tmp_path)
    assert chosen.flags == ["--compile", "on", "--cuda_graphs", "off"]
    assert chosen.step_seconds == 0.3  # from the second benchmark that has it
    assert chosen.epoch_seconds == choice.EPOCH_SECONDS
    assert chosen.notes[1].endswith("measured") and chosen.notes[2].endswith("guessed")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("value", [1e-7, math.nan])
def test_a_mode_that_differs_in_float64_is_wrong(tmp_path, error, value):
    leave(tmp_path, **passed("plain"))
    assert is_right(tmp_path, "plain")
    leave(tmp_path, **passed("plain", **{error: value}))
    assert not is_right(tmp_path, "plain")


@pytest.mark.parametrize("factor", [1, 1 + 1e-6, math.nan])
def test_the_gate_finds_a_wrong_step(monkeypatch, tmp_path, factor):
    """Wrong in the last outer step alone, as a replay may be."""
    match, calls = bench.match_by_adjoint, []

    def spoiled(*arguments, **keywords):
        matching = match(*arguments, **keywords)
        calls.append(matching)
        if len(calls) == bench.WARM_UPS:
            matching.grad_images.mul_(factor)
        return matching

    monkeypatch.setattr(bench, "match_by_adjoint", spoiled)
    _, flags = gpu.TINY.beside["gate_plain"]
    bench.main([*flags.split(), "--out", str(tmp_path / "gate_plain.json")])
    assert is_right(tmp_path, "plain") is (factor == 1)
    assert not torch.equal(calls[0].grad_images, calls[1].grad_images)


def test_a_mode_without_a_twin_to_compare_it_with_is_not_right(tmp_path):
    leave(tmp_path, **passed("plain", baseline="eager"))
    assert not is_right(tmp_path, "plain")


@pytest.mark.parametrize(
    ("errors", "right"),
    [
        ({"loss_error": 1e-3, "grad_images_error": 0.5}, True),  # which rounding does
        ({"loss_error": 0.5}, False),
        ({"loss_error": math.nan}, False),
    ],
)
def test_where_a_mode_is_timed_its_loss_is_that_of_the_twin(tmp_path, errors, right):
    leave(tmp_path, **passed("graphs"), unroll_ipc1={"results": {"short": errors}})
    assert is_right(tmp_path, "graphs") is right


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


def test_experts_that_are_complete_are_put_into_files(tmp_path):
    for number in (*range(11), 12):  # 11 is missing
        keep_expert(tmp_path, number, [[torch.full((2,), float(number))]] * 2)
    assert gpu.fill(tmp_path, 20) == 11
    experts = [expert for file in buffer_files(tmp_path) for expert in read_file(file)]
    assert [expert[0][0][0].item() for expert in experts] == [*range(11)]
    assert gpu.fill(tmp_path / "absent", 4) == 0


class Rehearsal(Session):
    """Records the steps instead of running them; those `failing` end with status 1."""

    failing = ()

    def run(self, *steps, environment=None, at_once=None, keep=0):
        self.commands |= {step.name: list(map(str, step.command)) for step in steps}
        return [Outcome(step.name, 1, 100, int(step.name in self.failing)) for step in steps]

    def parsed(self, step):
        """What its script makes of the command line of `step`."""
        _, script, *argv = self.commands[step]
        return PARSERS[script](argv)

    def options(self, step):
        return self.parsed(step).options


@pytest.fixture
def rehearse(tmp_path):
    def begin(what):
        end = time.monotonic() + 555
        session = Rehearsal(tmp_path / "out", tmp_path / "work" / what, end=end, environment={})
        session.commands = {}
        return session

    return begin


def holds(options, **expected):
    return {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize("plan", [gpu.H100, gpu.TINY], ids=["H100", "TINY"])
def test_what_the_choice_reads_is_measured(rehearse, tmp_path, plan):
    session = rehearse("measure")
    gpu.measure(session, plan, tmp_path / "work")
    gpu.test(session, plan)
    benches = {name: session.parsed(name) for name in (*plan.beside, *plan.timed)}
    for name, args in benches.items():
        assert args.out == session.results / f"{name}.json"
    modes = [name.removeprefix("gate_") for name in benches if name.startswith("gate_")]
    for mode in modes:
        variants = ["twin", choice.MODES[mode].unrolled]
        assert holds(benches[f"gate_{mode}"], precision="fp64", variants=variants)
    unrolled = [benches[name].variants for name in choice.UNROLLED if name in benches]
    assert all(variants[0] == "twin" for variants in unrolled)
    if plan is gpu.H100:
        assert modes == [*choice.MODES]
        for mode in choice.MODES.values():
            assert any(mode.unrolled in variants for variants in unrolled)
            assert mode.trained in benches["experts"].variants
    files = [word for word in session.commands["tests"] if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)


@pytest.fixture
def sets(tmp_path):
    """Leave a set of so many outer steps in a run of the row."""

    def leave_set(run, iteration):
        folder = tmp_path / "work" / "row" / "results" / "CIFAR10" / "ConvNetD3" / "ipc1" / run
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath(f"distilled_{iteration}.pt").touch()
        return str(folder / f"distilled_{iteration}.pt")

    return leave_set


def test_the_row_is_the_papers_but_for_the_experts_epochs(rehearse, tmp_path, monkeypatch, sets):
    monkeypatch.setattr(gpu, "fill", lambda folder, count: count)
    session = rehearse("row")
    (tmp_path / "work" / "measure").mkdir()
    leave(
        tmp_path / "work" / "measure",
        **passed("compiled"),
        unroll_variants=timed(uncaptured=0.1),
    )
    for run in gpu.CIFAR10.runs:
        sets(run, 1000)
    latest = sets("att", 2000)
    gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data", at_once=2)
    evaluations = [f"evaluate_{run}" for run in gpu.CIFAR10.runs]
    assert [*session.commands] == ["experts", *gpu.CIFAR10.runs, *evaluations, "evaluate_others"]
    experts, row = session.options("experts"), session.options("att")
    paper = {"dataset": "CIFAR10", "zca": True, "model": "ConvNetD3"}
    mode = {"compile": "on", "cuda_graphs": "off"}
    assert holds(experts, **paper, **mode, train_epochs=5, experts_at_once=1)
    assert 10 <= experts.num_experts <= 100  # half a second an epoch
    assert holds(row, **paper, **mode, syn_steps=80, expert_epochs=4, max_start_epoch=2)
    assert holds(row, lr_img=100.0, lr_lr=1e-7, lr_teacher=0.01, length="att", eval_it=0)
    assert holds(row, ema_decay=0.9999, Iteration=6000)
    assert holds(row, buffer_path=experts.buffer_path, data_path=experts.data_path)
    for run in gpu.CIFAR10.runs:
        options = session.options(run)
        if options.method == "att":
            assert options.max_start_epoch - 1 + options.expert_epochs <= experts.train_epochs
    for name, models in (("att", None), ("others", ["ResNet18", "VGG11", "AlexNet"])):
        options = session.parsed(f"evaluate_{name}")
        assert holds(options, distilled=latest, model=models, compile="off")


def test_what_fails_from_the_start_is_tried_plainly(rehearse, tmp_path, monkeypatch, sets):
    complete = iter([0, 4])
    monkeypatch.setattr(gpu, "fill", lambda folder, count: next(complete))
    session = rehearse("row")
    for run in [*gpu.CIFAR10.runs][1:]:
        sets(run, 1000)
    gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data", at_once=2)
    tried = ["experts", "experts_plain", "att", "att_plain"]
    assert [session.options(name).compile for name in tried] == ["auto", "off", "auto", "off"]
    assert [session.options(name).cuda_graphs for name in tried] == ["auto", "off", "auto", "off"]
    assert not {"fixed_plain", "evaluate_att"} & {*session.commands}


def test_runs_that_have_begun_go_on_with_their_experts(rehearse, tmp_path, sets):
    checkpoint = Path(sets("att", 1000)).with_name("checkpoint.pt")
    checkpoint.touch()
    session = rehearse("row")
    gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data", at_once=1)
    assert "att" in session.commands and "experts" not in session.commands


def test_without_a_complete_expert_the_row_ends_in_one_line(rehearse, tmp_path):
    session = rehearse("row")
    with pytest.raises(UserError, match="no expert is complete"):
        gpu.row(session, gpu.CIFAR10, tmp_path / "work", tmp_path / "data", at_once=1)
    assert [*session.commands] == ["experts", "experts_plain"]


def test_a_row_without_its_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        gpu.main(["row", str(tmp_path), "--work", str(tmp_path), "--data", str(tmp_path)])


@pytest.mark.slow
def test_all_calls_on_a_cpu(tmp_path):
    """A distillation is planned far too long, so that it is cut off, and its set evaluated."""
    out, work = tmp_path / "out", tmp_path / "work"

    def call(what, seconds, *flags):
        command = [sys.executable, "-m", "scripts.gpu", what, str(out / what), "--tiny", *flags]
        command += ["--work", str(work), "--seconds", str(seconds)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 9)
        return run, {*packed(out / what / "session.tgz")}

    run, files = call("measure", 280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {"gate_plain.json", "unroll_ipc1.json", "choice.json"} <= files
    chosen = choose(work / "measure")
    assert chosen.flags == ["--compile", "off", "--cuda_graphs", "auto"]
    assert all(note.endswith("measured") for note in chosen.notes[1:]), chosen.notes
    run, files = call("test", 120)
    assert run.returncode == 0 and "tests.xml" in files, run.stdout + run.stderr

    run, files = call("row", 240, "--at_once", "2")
    assert run.returncode == 1, run.stdout + run.stderr
    summary = (out / "row" / "summary.txt").read_text()
    assert "cut off" in next(line for line in summary.splitlines() if line.startswith("att "))
    assert summary.count("cut off") == 1 and summary.count("exit 0") == 5, summary
    folder = "results/digits/ConvNetD2/ipc1/att"
    assert {f"{folder}/{name}" for name in ("eval.json", "metrics.jsonl", "config.yaml")} <= files
    measured = json.loads((work / "row" / folder / "eval.json").read_text())
    assert len(measured) == 3  # the set, random images, and the set on another network
