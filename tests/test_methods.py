"""The door for methods: which flags, rows and defaults each has, and a run by the second one."""

import re

import pytest
import torch
from short_runs import assert_cut_off_goes_on_alike, images, records, without_costs

import distill_att
from utils.config.resolve import CONFIGS, DEFAULT, FLAG, resolve
from utils.core.errors import UserError
from utils.methods.registry import METHODS, foreign_flags, title
from utils.options import DistillOptions
from utils.plan.prepare import check_flags

MATCHING = sorted(set(METHODS) - {"dm"})


def resolved(*argv):
    return resolve(DistillOptions, argv, description="", find_yaml=distill_att.find_yaml)


def refusal(*argv):
    with pytest.raises(UserError) as error:
        check_flags(resolved(*argv))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--method", "dm", "--syn_steps", "5"], ["--syn_steps", "dm", "--batch_real", "--lr_net"]),
        (["--method", "dm", "--length", "att"], ["--length", "dm"]),  # its default, but given
        (["--lr_net", "5"], ["--lr_net", "att", "--syn_steps"]),
        (["--method", "mtt", "--lr_net", "1"], ["--lr_net", "mtt"]),
    ],
)
def test_a_flag_of_another_method_is_refused(argv, names):
    message = refusal(*argv, "--dataset", "digits")
    assert all(name in message for name in names)


def test_a_setting_of_another_method_in_a_yaml_is_refused(tmp_path):
    row = tmp_path / "row.yaml"
    row.write_text("syn_steps: 5\n")
    message = refusal("--method", "dm", "--config", str(row))
    assert f"syn_steps in {row}" in message


def test_unknown_methods_are_refused_with_the_choices():
    with pytest.raises(UserError, match=r"--method: unknown value 'mttt'; choices: .*dm"):
        resolved("--method", "mttt")


def test_a_method_brings_its_defaults_and_flags_and_yaml_win(tmp_path):
    found = resolved("--method", "mtt", "--dataset", "digits")
    assert found.options.length == "fixed"
    assert found.sources["length"] == "--method mtt"
    assert found.sources["distance"] == DEFAULT
    by_hand = resolved("--method", "mtt", "--dataset", "digits", "--length", "att")
    assert (by_hand.options.length, by_hand.sources["length"]) == ("att", FLAG)
    row = tmp_path / "row.yaml"
    row.write_text("method: dm\nlr_img: 7\n")
    from_yaml = resolved("--config", str(row))
    assert from_yaml.options.lr_img == 7
    assert from_yaml.options.Iteration == METHODS["dm"].presets["Iteration"]
    assert from_yaml.sources["Iteration"] == "--method dm"


@pytest.mark.parametrize("method", ["pp", "mtt", "tesla"])
def test_relatives_without_a_row_of_their_own_take_that_of_att(method):
    path = distill_att.find_yaml({"dataset": "digits", "ipc": 1, "method": method})
    assert path == distill_att.find_yaml({"dataset": "digits", "ipc": 1})


def test_a_method_has_rows_of_its_own(capsys):
    path = distill_att.find_yaml({"dataset": "CIFAR10", "ipc": 9, "method": "dm"})
    assert path.name == "ipc10_dm.yaml"
    assert "taking the nearest" in capsys.readouterr().out
    assert distill_att.find_yaml({"dataset": "folder", "ipc": 1, "method": "dm"}) is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/ipc*_*.yaml")), ids=lambda path: str(path))
def test_a_row_is_of_the_method_in_its_name(path):
    found = resolved("--config", str(path))
    check_flags(found)
    name = path.stem.split("_", 1)[1]
    assert re.sub("[ +]", "_", title(vars(found.options)).upper()) == name.upper()
    if name != "dm":
        same = resolved("--config", str(path), "--method", name)
        assert title(vars(same.options)) == title(vars(found.options))


def test_datm_without_a_range_of_start_epochs_is_refused():
    assert "--start_epochs" in refusal("--method", "datm", "--dataset", "digits")


def test_flags_of_methods_are_told_apart():
    assert foreign_flags("dm") >= {"syn_steps", "lr_teacher", "flat", "length", "unroll"}
    assert foreign_flags("att") >= {"batch_real", "lr_net", "window", "inner_opt"}
    assert not foreign_flags("bptt") & {"syn_steps", "lr_teacher", "unroll", "lr_net"}
    assert not foreign_flags("dm") & {"lr_img", "micro_batch", "Iteration"}
    assert foreign_flags("ld") >= {"lr_img", "ema_decay", "students", "lr_lr", "syn_steps", "mom_y"}
    assert foreign_flags("dc") >= {"syn_steps", "lr_teacher", "unroll", "lr_y", "students"}
    assert not foreign_flags("dsa") & {"batch_real", "lr_net", "batch_syn", "outer_loop", "lr_img"}
    assert foreign_flags("cafe") >= {"outer_loop", "dis_metric", "syn_steps", "unroll", "students"}
    assert not foreign_flags("cafe_dsa") & {"batch_real", "batch_syn", "lr_net", "lambda_1", "beta"}
    assert not foreign_flags("ld") & {"lr_y", "batch_syn", "batch_target", "unroll", "lr_net"}


SHORT_DM = (
    "--method dm --dataset digits --model ConvNetD1 --ipc 1 --Iteration 4 --eval_it 2 "
    "--num_eval 1 --epoch_eval_train 1 --compile off --run_name run"
).split()


def distil(folder, *flags):
    """A short run of DM; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT_DM, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc1/run"


@pytest.fixture(scope="module")
def dm_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("dm"))


def test_a_run_of_dm_logs_saves_and_needs_no_experts(dm_run):
    steps = records(dm_run, "step")
    assert [list(step) for step in steps] == [["kind", "iteration", "loss", "seconds"]] * 4
    content = torch.load(dm_run / "distilled_best.pt", weights_only=True)
    assert content["syn_lr"] == 0.01
    assert content["config"]["method"] == "dm"
    assert "syn_steps" not in content["config"]
    config = (dm_run / "config.yaml").read_text()
    assert "batch_real: 256" in config
    assert not any(f"{name}:" in config for name in foreign_flags("dm"))
    assert not torch.equal(images(dm_run / "distilled_0.pt"), images(dm_run / "distilled_4.pt"))


def test_its_own_configuration_makes_it_again(dm_run, tmp_path):
    flags = ["--config", str(dm_run / "config.yaml"), "--save_path", str(tmp_path)]
    assert distill_att.main(flags) == 0
    again = tmp_path / "digits/ConvNetD1/ipc1/run"
    assert without_costs(again) == without_costs(dm_run)


def test_a_run_of_dm_that_is_cut_off_goes_on_alike(dm_run, tmp_path, monkeypatch):
    assert_cut_off_goes_on_alike(lambda: distil(tmp_path), dm_run, monkeypatch)


def test_a_run_is_not_continued_by_another_method(finished):
    """`finished` is a run of ATT."""
    flags = "--method dm --dataset digits --ipc 1 --run_name run --model ConvNetD1".split()
    with pytest.raises(UserError, match="was begun with --method att, not dm"):
        distill_att.main([*flags, "--save_path", str(finished.parents[3])])
