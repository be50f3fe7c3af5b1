"""Rates and lengths that nobody gives are found on data and experts; bounded steps stay of use."""

import math
import re

import pytest
import torch
import yaml
from short_runs import SHORT, distill, images, records, without_costs

import distill_att
from utils.config.resolve import Resolved
from utils.core.errors import UserError
from utils.methods.base import Learned, Step
from utils.methods.outer_state import OuterState
from utils.methods.trajectory.tuning import (
    IMAGE_STEP,
    MAX_UPDATE,
    RATE_STEP,
    find_lengths,
    find_rates,
    stalled,
)
from utils.options import DistillOptions

RATES = {"lr_img", "lr_lr", "lr_teacher"}
LENGTHS = {"syn_steps", "expert_epochs", "max_start_epoch"}


def test_a_learned_logarithm_stays_positive_and_no_step_goes_beyond_its_bound():
    state = OuterState(
        [
            Learned("images", torch.zeros(4, 1, 2, 2), 10.0, "lr_img", bound=0.1),
            Learned("syn_lr", torch.tensor(0.5), 3.0, "lr_lr", positive=True, log=True, bound=0.2),
        ],
        syn_lr=0.5,
        ema_decay=0.9,
        if_not_finite="",
    )
    grads = {"images": torch.full((4, 1, 2, 2), 7.0), "syn_lr": torch.tensor(1e6)}
    state.update(Step(torch.tensor(1.0), grads, record={}))
    torch.testing.assert_close(state.images, torch.full((4, 1, 2, 2), -0.1))
    assert state.syn_lr == pytest.approx(0.5 * math.exp(-0.2))
    small = {"images": torch.full((4, 1, 2, 2), 0.001), "syn_lr": torch.tensor(0.0)}
    state.update(Step(torch.tensor(1.0), small, record={}))
    torch.testing.assert_close(state.images, torch.full((4, 1, 2, 2), -0.1 - 0.05 - 0.01))
    assert state.syn_lr == pytest.approx(0.5 * math.exp(-0.3))  # by the momentum


@pytest.mark.parametrize("ipc", [1, 10, 50])
@pytest.mark.parametrize("epochs", [1, 2, 4, 50])
@pytest.mark.parametrize("steps_an_epoch", [1, 6, 196])
def test_lengths_fit_the_experts(ipc, epochs, steps_an_epoch):
    found = find_lengths(
        DistillOptions(ipc=ipc),
        epochs=epochs,
        steps_an_epoch=steps_an_epoch,
        is_open=lambda name: True,
    )
    assert found.keys() == LENGTHS and min(found.values()) >= 1
    assert found["max_start_epoch"] - 1 + found["expert_epochs"] <= epochs


class Valley:
    """A method whose loss is least at the syn_lr `best`; it cannot be unrolled above 1."""

    def __init__(self, best):
        self.best, self.tried = best, []

    def step(self, iteration, learned):
        self.tried.append(learned["syn_lr"].item())
        distance = (learned["syn_lr"] / self.best).log().square()
        loss = distance if learned["syn_lr"] <= 1 else torch.tensor(math.nan)
        slope = 4 * torch.ones_like(learned["images"])
        return Step(loss, {"images": slope, "syn_lr": torch.tensor(-50.0)}, record={})


@pytest.mark.parametrize("best", [1e-4, 0.003, 0.01, 0.5, 100.0])
def test_rates_are_those_of_the_least_loss_and_of_small_first_steps(best):
    method = Valley(best)
    found = find_rates(DistillOptions(), method, torch.zeros(2, 1, 8, 8), is_open=lambda name: True)
    assert abs(math.log10(found["lr_teacher"] / min(best, 1.0))) <= 0.26
    assert found["lr_img"] == pytest.approx(IMAGE_STEP / 4, rel=0.05)
    assert found["lr_lr"] == pytest.approx(RATE_STEP / 50 / found["lr_teacher"], rel=0.05)
    assert (found["max_update"], found["log_syn_lr"]) == (MAX_UPDATE, True)


def test_what_is_given_is_left_alone():
    found = find_rates(
        DistillOptions(lr_teacher=0.5),
        Valley(0.01),
        torch.zeros(2, 1, 8, 8),
        is_open=lambda name: name == "lr_img",
    )
    assert found.keys() == {"lr_img"}


@pytest.mark.parametrize("start_epochs", [None, [1, 2]])
def test_a_bound_that_another_flag_replaces_is_not_found(start_epochs):
    resolved = Resolved.of(DistillOptions(start_epochs=start_epochs))
    assert resolved.is_open("max_start_epoch") == (start_epochs is None)
    assert resolved.is_open("expert_epochs")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A row that gives no rates and no lengths, as for a data set without one."""
    path = tmp_path_factory.mktemp("rows") / "bare.yaml"
    path.write_text("dataset: digits\n")
    return path


def flags(bare, *more):
    """Of a short run, but for lengths."""
    few = "--dataset digits --model ConvNetD1 --Iteration 4 --eval_it 0 --seed 3".split()
    return [*few, "--run_name", "run", "--config", str(bare), *more]


def test_a_run_finds_records_and_keeps_its_rates(bare, experts, tmp_path, capsys, monkeypatch):
    argv = flags(bare, "--buffer_path", str(experts), "--save_path", str(tmp_path))
    assert distill_att.main([*argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"syn_steps +20 +found on the data", out)
    assert "to be found on the data" in out and not re.search(r"lr_img +\d", out)

    assert distill_att.main([*argv, "--Iteration", "2"]) == 0
    assert re.search(r"found on the data: .*lr_img \d", capsys.readouterr().out)
    folder = tmp_path / "digits/ConvNetD1/ipc1/run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["log_syn_lr"] is True and config["max_update"] == MAX_UPDATE

    monkeypatch.setattr("utils.methods.trajectory.tuning.PROBES", None)  # nothing is tried again
    assert distill_att.main(argv) == 0
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert {n: again[n] for n in RATES | LENGTHS} == {n: config[n] for n in RATES | LENGTHS}
    assert len(records(folder, "step")) == 4
    with pytest.raises(UserError, match="was begun with lr_img="):
        distill_att.main([*argv, "--lr_img", "1"])

    given = [f"--{name}={config[name]}" for name in sorted(RATES | LENGTHS | {"max_update"})]
    where = ["--buffer_path", str(experts), "--save_path", str(tmp_path / "given")]
    assert distill_att.main([*flags(bare, *where), *given, "--log_syn_lr"]) == 0
    other = tmp_path / "given/digits/ConvNetD1/ipc1/run"
    assert without_costs(other) == without_costs(folder)
    last = "distilled_last.pt"
    assert torch.equal(images(other / last), images(folder / last))


@pytest.mark.parametrize("flag", ["lr_lr", "lr_img", "lr_teacher"])
def test_a_divergence_names_a_value_that_works(experts, tmp_path, capsys, flag):
    argv = [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path), "--eval_it", "0"]
    assert distill_att.main([*argv, f"--{flag}", "1e30", "--run_name", "bad"]) == 1
    value = re.search(rf"lower .*\(--{flag} (\S+), say\)", capsys.readouterr().err)[1]
    distill(experts, tmp_path, "--eval_it", "0", f"--{flag}", value)


def test_a_run_that_learns_nothing_says_so():
    still = [{"length": 1}] * 3
    assert "nothing is learned" in stalled([0.99, 1.0, 0.98], still)
    assert "nothing is learned" in stalled([0.99] * 3, [{"length": [1, 1]}] * 3)
    assert stalled([0.5, 0.6, 0.7], still) is None
    assert stalled([0.99] * 3, [{"length": 1}, {"length": 4}, {"length": 1}]) is None
