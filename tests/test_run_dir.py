"""The run directory's names, log and lock."""

import json

import pytest

from utils.core.errors import UserError
from utils.run.directory import RunDir
from utils.run.log import MetricsLog, read_records

STEP, EVAL = {"kind": "step", "iteration": 0}, {"kind": "eval", "iteration": 0}


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def log(run):
    run.path.mkdir()
    return MetricsLog(run.path, wandb_mode="disabled")


def test_an_unused_directory(run):
    assert run.unused().path == run.path
    run.path.mkdir()
    assert run.unused().path.name == "run_2"
    run.unused().path.mkdir()
    assert run.unused().path.name == "run_3"


def test_two_at_once_are_refused(run):
    refusal = pytest.raises(UserError, match=r"another process is at work in .*run: .*--run_name")
    with run.exclusive(None), refusal, RunDir(run.path).exclusive(None):
        pass
    with run.exclusive(None):
        pass


def test_one_who_worked_between_looking_and_beginning_is_noticed(run):
    checkpoint = {name: {} for name in ("config", "best", "measured_by", "how")}
    checkpoint |= {"num_experts": 1, "state": {"iteration": 3}, "evaluated": 2}
    run.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="has just worked in"), run.exclusive(None):
        pass
    with run.exclusive(checkpoint):
        pass


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        # Behind the second evaluation, before it, before the rewind, before anything.
        ({"iteration": 2, "evaluated": 2, "rewinds": 1}, [0, 1, 2, 3, 4, 5]),
        ({"iteration": 2, "evaluated": 0, "rewinds": 1}, [0, 1, 2, 3]),
        ({"iteration": 1, "evaluated": 0, "rewinds": 0}, [0, 1]),
        ({"iteration": -1, "evaluated": -1, "rewinds": 0}, []),
    ],
)
def test_what_is_behind_the_checkpoint_is_dropped(run, log, state, kept):
    records = [EVAL, STEP, {"kind": "rewind", "iteration": 9}]
    records += [STEP | {"iteration": 1}, *([EVAL | {"iteration": 2}] * 2)]
    for record in records:
        log.log(**record)
    with open(run.metrics, "a") as file:
        file.write('{"kind": "step", "itera')
    log.keep_up_to(state["iteration"], evaluated=state["evaluated"], rewinds=state["rewinds"])
    assert read_records(run.metrics) == [records[i] for i in kept]
    assert len(run.metrics.read_text().splitlines()) == len(kept)


def test_lines_that_are_no_records_are_passed_over(run, log):
    log.log(**STEP)
    with open(run.metrics, "ab") as file:
        for line in (b"3", b"{}", b'{"kind": "step", "iteration": "x"}', b"\xff", b"[" * 10**5):
            file.write(line + b"\n")
    assert read_records(run.metrics) == [STEP]
    assert run.has_steps()


def test_a_line_comes_back_as_it_was_written(run, log):
    log.log(kind="step", iteration=0, loss=0.1 + 0.2, length=[1, 2], start_epoch=0)
    before = run.metrics.read_text()
    log.keep_up_to(1, evaluated=-1, rewinds=0)
    assert run.metrics.read_text() == before
    assert json.loads(before)["loss"] == 0.1 + 0.2


def test_a_run_says_what_it_held(finished):
    records = read_records(finished / "metrics.jsonl")
    held = records[-1]
    steps = [record for record in records if record["kind"] == "step"]
    assert (held["kind"], held["iteration"]) == ("memory", len(steps) - 1)
    assert 0 <= held["raised_bytes"] < held["peak_bytes"]
    assert 10**8 < held["peak_bytes"] < 10**11
