"""Kills, full disks, signals and second processes: the jobs of scripts/faults, a few of each.

Each test strikes, continues, and compares all files with those of the undisturbed job.
"""

import pytest
import torch

from scripts.faults import __main__ as faults
from scripts.faults import strikes
from scripts.faults.bad_calls import try_bad_call
from scripts.faults.calls import AtWrite
from scripts.faults.contents import broken, lost, read_folder
from scripts.faults.jobs import LONGER, TINY, copied, make_jobs

BUFFER, DISTILL, EVAL = range(3)
each_script = pytest.mark.parametrize("k", range(3), ids=["buffer", "distill_att", "eval"])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("jobs"), TINY)


@pytest.fixture(scope="module")
def longer_jobs(tmp_path_factory):
    return make_jobs(tmp_path_factory.mktemp("longer"), LONGER)


def check(strikes, at_least=1):
    wrong = list(strikes)
    assert [line for lines in wrong for line in lines] == []
    assert len(wrong) >= at_least


@pytest.mark.parametrize(("k", "number"), [(BUFFER, 2), (DISTILL, 2), (EVAL, 1)])
def test_a_killed_job_is_continued(jobs, k, number):
    check(strikes.kills(jobs[k], number, 0), number)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "number"), [(BUFFER, 16), (DISTILL, 18), (EVAL, 16)])
def test_jobs_of_seconds_are_killed_fifty_times(longer_jobs, k, number):
    check(strikes.kills(longer_jobs[k], number, 1), number)


@pytest.mark.parametrize(("what", "fault"), [("rename", "kill"), ("open", "full")])
@pytest.mark.parametrize(("k", "step"), [(BUFFER, 4), (DISTILL, 12), (EVAL, 7)])
def test_a_fault_at_some_writes(jobs, what, fault, k, step):
    check(strikes.at_writes(jobs[k], what, fault, step=step))


@pytest.mark.slow
@each_script
@pytest.mark.parametrize(
    ("what", "fault"), [("open", "kill"), ("rename", "kill"), ("open", "full")]
)
def test_a_fault_at_every_write(jobs, what, fault, k):
    check(strikes.at_writes(jobs[k], what, fault), 4)


@each_script
def test_a_signal_names_the_command_that_continues(jobs, k):
    check(strikes.signals(jobs[k], 2, 0, fresh=0), 2)


@pytest.mark.slow
@each_script
def test_signals_to_jobs_of_seconds(longer_jobs, k):
    check(strikes.signals(longer_jobs[k], 6, 0), 6)


@pytest.mark.parametrize("k", [BUFFER, DISTILL])
def test_a_second_call_of_a_job_at_work_is_refused(jobs, k):
    check(strikes.second_call(jobs[k]))


def test_two_evaluations_record_side_by_side(jobs):
    check(strikes.side_by_side(jobs[EVAL]))


@pytest.mark.parametrize(
    "numbers", [range(20), pytest.param(range(1000, 1300), marks=pytest.mark.slow)], ids=len
)
def test_bad_input_is_refused_in_one_line(jobs, numbers):
    check((lines for n in numbers for lines in try_bad_call(0, n, jobs)), len(numbers))


def test_the_harness_sees_what_it_looks_for(jobs):
    """A harness that finds nothing wrong must be one that would find it."""
    job = jobs[DISTILL]
    with copied(job.reference) as folder:
        assert job.finish(folder) == []
        (run,) = folder.glob("results/digits/*/ipc1/run")
        changed = torch.load(run / "distilled_best.pt", weights_only=True)
        changed["images"][0, 0, 0, 0] += 1e-6
        torch.save(changed, run / "distilled_best.pt")
        (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-100])
        (run / "images_best.png").unlink()
        (run / ".left.tmp").touch()
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"kind"')
        found = "\n".join(job.compare(folder))
        for part in (
            "best.pt']['images'] is tensor",
            "images_best.png'] is missing",
            "checkpoint.pt'] is ",
            ".left.tmp'] is there too",
            "metrics.jsonl'][",
        ):
            assert part in found
        (line,) = broken(read_folder(folder))
    assert "checkpoint.pt is not whole" in line


def test_what_is_lost_is_less_of_it():
    before, now = {"a.pt": [1, 2], "b": 1, "c": 1}, {"a.pt": [1], "b": 2}
    assert lost(before, now, ["a.pt", "b"]) == ["a.pt holds 1 instead of 2"]
    assert lost(before, now, ["b", "c"]) == ["c holds 0 instead of 1"]


def test_a_fault_strikes_where_it_is_told_to(jobs):
    job = jobs[BUFFER]
    with copied(job.start) as folder:
        assert job.call(folder, fault=AtWrite("rename", 1, "kill")).wait() == -9
        assert len(list(folder.rglob(".*.tmp"))) == 1
        call = job.call(folder, fault=AtWrite("open", 2, "full"))
        assert call.wait() == 2
        assert "cannot write" in call.stderr


def test_the_table(tmp_path):
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- faults -->\nold\n<!-- end -->\nafter\n")
    counted = {"buffer.py": {"injected": 2, "wrong": []}, "eval.py": {"injected": 1, "wrong": [""]}}
    record = {"kills": {"faults": {"SIGKILL at a random moment": counted}}}
    faults.write_table(record, docs)
    faults.write_table(record, docs)
    text = docs.read_text()
    assert text.startswith("before\n<!-- faults -->\n| fault |")
    assert "| SIGKILL at a random moment | 3 (buffer 2, eval 1) |" in text
    assert text.endswith("| 1 |\n<!-- end -->\nafter\n")
