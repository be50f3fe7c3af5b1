"""Whatever cuts a run off, the same command continues it to the same end."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from short_runs import SHORT, distill, images, records, snapshots, train_experts, without_costs

import distill_att
from utils.compute.cohort import Cohort
from utils.core import stopping
from utils.core.errors import UserError
from utils.core.stopping import Interrupted
from utils.experts import unfinished
from utils.experts.files import (
    finished_file,
    lock_and_list_missing,
    read_file,
    unfinished_file,
)
from utils.methods.outer_state import Diverged, OuterState
from utils.run.log import MetricsLog


def after(calls, function, error=Interrupted):
    """`function`, whose call number `calls` is cut off, and the later ones too."""
    count = 0

    def cut_off(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **kwargs)

    return cut_off


def assert_same_run(one, other):
    assert without_costs(one) == without_costs(other)
    names = sorted(path.name for path in other.glob("distilled_*.pt"))
    assert sorted(path.name for path in one.glob("distilled_*.pt")) == names
    for name in names:
        assert torch.equal(images(one / name), images(other / name))


@pytest.mark.parametrize(("ends", "kept"), [("killed", 2), ("asked to end", 3)])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    finished, experts, tmp_path, monkeypatch, ends, kept
):
    """Killed, it goes back to its last checkpoint; asked to end, it makes one after its step."""
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, Interrupted)):
        if ends == "killed":
            patch.setattr(OuterState, "update", after(3, OuterState.update, KeyboardInterrupt))
        else:
            asked = iter([False, False, True])
            patch.setattr(distill_att.stopping, "received_anywhere", lambda: next(asked))
        distill(experts, tmp_path)
    run_dir = tmp_path / "digits/ConvNetD1/ipc1/run"
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["state"]["iteration"] == kept
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')  # a kill may cut a line
    assert_same_run(distill(experts, tmp_path), finished)
    assert len(yaml.safe_load((run_dir / "config.yaml").read_text())["environment"]) == 2


def test_restart_begins_anew_beside_what_is_there(finished, experts, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "digits/ConvNetD1/ipc1/run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    distill(experts, tmp_path, "--restart", "--lr_img", "9", "--eval_it", "0")
    second = tmp_path / "digits/ConvNetD1/ipc1/run_2"
    assert str(second) in capsys.readouterr().out
    assert len(records(second, "step")) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert distill_att.stopping.command().endswith("--run_name run_2 --no_restart")


def diverge_above(monkeypatch, rate, value, *, at):
    """Outer step `at` cannot be taken as long as `rate` is above `value`."""
    update = OuterState.update

    def checked(self, step):
        if self.iteration == at and self.rates[rate] > value:
            raise Diverged(f"too fast: lower --{rate}", rate=rate)
        update(self, step)

    monkeypatch.setattr(OuterState, "update", checked)


REWIND = ["--on_divergence", "rewind"]


@pytest.fixture(scope="module")
def rewound(experts, tmp_path_factory):
    """A run that has diverged twice and gone back."""
    with pytest.MonkeyPatch.context() as patch:
        diverge_above(patch, "lr_img", 1.0, at=3)  # digits have 3
        return distill(experts, tmp_path_factory.mktemp("rewound"), *REWIND)


def test_a_run_that_diverges_goes_back_with_half_the_rate(rewound):
    (first, second) = records(rewound, "rewind")
    assert (
        (first["iteration"], first["back_to"]) == (second["iteration"], second["back_to"]) == (3, 2)
    )
    assert (first["rate"], first["value"], second["value"]) == ("lr_img", 1.5, 0.75)
    assert [record["iteration"] for record in records(rewound, "step")] == [0, 1, 2, 3]
    assert [record["kind"] for record in without_costs(rewound)].index("rewind") == 6
    saved = torch.load(rewound / "distilled_last.pt", weights_only=True)
    assert [rewind["value"] for rewind in saved["rewinds"]] == [1.5, 0.75]
    assert saved["config"]["lr_img"] == 3.0
    checkpoint = torch.load(rewound / "checkpoint.pt", weights_only=True)["state"]
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == 0.75


@pytest.mark.parametrize("lines", [7, 8, 9])
def test_a_rewound_run_continues_alike(rewound, experts, tmp_path, monkeypatch, lines):
    """Cut off before any of its lines is logged."""
    diverge_above(monkeypatch, "lr_img", 1.0, at=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        log = MetricsLog.log
        patch.setattr(MetricsLog, "log", after(lines, log, KeyboardInterrupt))
        distill(experts, tmp_path, *REWIND)
    assert_same_run(distill(experts, tmp_path, *REWIND), rewound)


def test_after_three_rewinds_it_stops(experts, tmp_path, capsys):
    argv = [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path), *REWIND]
    argv += ["--run_name", "run", "--eval_it", "0", "--lr_lr", "1e6"]
    assert distill_att.main(argv) == 1
    assert "after 3 rewinds: syn_lr became" in capsys.readouterr().err
    run_dir = tmp_path / "digits/ConvNetD1/ipc1/run"
    assert [record["value"] for record in records(run_dir, "rewind")] == [5e5, 2.5e5, 1.25e5]


def cut_off_training(path, monkeypatch, calls, number, *flags):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Cohort, "train", after(calls, Cohort.train))
        train_experts(path, number, *flags)


def assert_same_experts(one, other):
    pairs = list(zip(snapshots(one), snapshots(other), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not list(Path(one).rglob("*finished_*"))


def test_an_expert_goes_on_at_its_last_epoch(experts, tmp_path, monkeypatch, capsys):
    cut_off_training(tmp_path, monkeypatch, 3, 2)  # in the second epoch of expert 1
    folder = tmp_path / "digits/ConvNetD1"
    assert unfinished_file(folder, 1).exists()
    assert len(read_file(finished_file(folder, 0))) == 1
    assert not list(folder.glob("replay_buffer_*"))
    capsys.readouterr()
    train_experts(tmp_path, 2)
    assert "going on with expert 1 after 1 epochs" in capsys.readouterr().out
    assert_same_experts(tmp_path, experts)


def test_a_signal_while_an_expert_is_tested_costs_no_epoch(tmp_path, monkeypatch):
    flags = ["--val_fraction", "0.9", "--train_epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(stopping, "_first", None)
        patch.setattr(unfinished, "accuracy", lambda *_: stopping._receive(signal.SIGTERM, None))
        train_experts(tmp_path, 1, *flags)
    monkeypatch.setattr(Cohort, "train", after(0, Cohort.train))  # nothing is left to train
    train_experts(tmp_path, 1, *flags)
    assert len(snapshots(tmp_path)) == 2


def test_momentum_goes_on_too(tmp_path, monkeypatch):
    flags = ["--mom", "0.9", "--decay", "--train_epochs", "4"]
    train_experts(tmp_path / "whole", 1, *flags)
    cut_off_training(tmp_path / "cut", monkeypatch, 2, 1, *flags)
    train_experts(tmp_path / "cut", 1, *flags)
    assert_same_experts(tmp_path / "cut", tmp_path / "whole")


def test_flat_experts_are_others_and_go_on_alike(tmp_path, monkeypatch):
    few = ["--val_fraction", "0.9"]
    flat = [*few, "--flat", "--rho", "0.1"]
    train_experts(tmp_path / "plain", 1, *few)
    train_experts(tmp_path / "whole", 1, *flat)
    cut_off_training(tmp_path / "cut", monkeypatch, 1, 1, *flat)
    train_experts(tmp_path / "cut", 1, *flat)
    assert_same_experts(tmp_path / "cut", tmp_path / "whole")
    assert (tmp_path / "whole/digits_FLAT_VAL0.9/ConvNetD1/replay_buffer_0.pt").exists()
    pairs = zip(snapshots(tmp_path / "whole"), snapshots(tmp_path / "plain"), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True, False, False]  # as they begin; epochs


def test_of_experts_in_step_no_more_than_the_work_of_one_is_lost(tmp_path, monkeypatch):
    """Killed without a chance to save: two in step are kept at half of the epochs."""
    flags = ["--experts_at_once", "2", "--train_epochs", "4"]
    train_experts(tmp_path / "whole", 2, *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cohort, "train", after(3, Cohort.train, KeyboardInterrupt))
        train_experts(tmp_path / "cut", 2, *flags)
    for number in range(2):
        kept = torch.load(unfinished_file(tmp_path / "cut/digits/ConvNetD1", number))
        assert len(kept["trajectory"]) == 3
    train_experts(tmp_path / "cut", 2, *flags)
    assert_same_experts(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_damaged_unfinished_expert_is_trained_anew(
    experts, tmp_path, monkeypatch, caplog, content
):
    cut_off_training(tmp_path, monkeypatch, 1, 2)
    path = unfinished_file(tmp_path / "digits/ConvNetD1", 0)
    if content is None:
        torch.save({"trajectory": [[torch.zeros(1)]], "training": {}}, path)
    else:
        path.write_bytes(content)
    train_experts(tmp_path, 2)
    assert "unfinished_expert_0.pt is of no use" in caplog.text
    assert_same_experts(tmp_path, experts)


def test_an_unfinished_expert_of_other_settings_is_not_gone_on_with(experts, tmp_path, monkeypatch):
    cut_off_training(tmp_path, monkeypatch, 1, 2, "--lr_teacher", "0.02")
    train_experts(tmp_path, 2)
    assert_same_experts(tmp_path, experts)


def test_ranges_of_experts_are_those_of_one_call(tmp_path):
    flags = ["--save_interval", "2"]
    train_experts(tmp_path / "whole", 4, *flags)
    train_experts(tmp_path / "ranges", 4, *flags, "--first_expert", "2")
    assert len(snapshots(tmp_path / "ranges")) == 2 * 3
    train_experts(tmp_path / "ranges", 2, *flags)
    assert_same_experts(tmp_path / "ranges", tmp_path / "whole")


@pytest.mark.parametrize(("first", "number"), [("1", 4), ("4", 4), ("6", 4)])
def test_a_range_must_begin_a_file(tmp_path, first, number):
    with pytest.raises(UserError, match=f"--first_expert {first} .*--save_interval 2"):
        train_experts(tmp_path, number, "--save_interval", "2", "--first_expert", first)
    assert not list(tmp_path.iterdir())


def test_two_processes_add_other_files_but_not_the_same(tmp_path):
    settings = {"lr_teacher": 0.01}
    with lock_and_list_missing(tmp_path, settings, range(4), experts_per_file=2) as missing:
        assert missing == [0, 1, 2, 3]
        refusal = pytest.raises(UserError, match=r"another process trains .*replay_buffer_1 in")
        with refusal, lock_and_list_missing(tmp_path, settings, range(2, 6), experts_per_file=2):
            pass
        with lock_and_list_missing(tmp_path, settings, range(4, 6), experts_per_file=2) as others:
            assert others == [4, 5]
        # Settings without an expert yet are someone's all the same while that one is at work.
        refusal = pytest.raises(UserError, match=r"lr_teacher=0.01, not 0.1")
        with (
            refusal,
            lock_and_list_missing(tmp_path, {"lr_teacher": 0.1}, range(4, 6), experts_per_file=2),
        ):
            pass
    with lock_and_list_missing(tmp_path, {"lr_teacher": 0.1}, range(4), experts_per_file=2):
        pass
    assert json.loads((tmp_path / "experts.json").read_text()) == {"lr_teacher": 0.1}
