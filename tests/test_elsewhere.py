"""Networks from elsewhere: the user's own, torchvision's and timm's."""

import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, records, run
from torch import nn

import buffer
import distill_att
import eval as script
from networks import build_network, elsewhere, folder_name, is_name
from utils.compute.cohort import Cohort, Recipe
from utils.compute.contract import (
    UntraceableError,
    abilities,
    check_batches,
    check_head,
    check_known,
    check_repeatable,
    check_traceable,
)
from utils.compute.cost import fitting_models, network_cost
from utils.compute.flat import FlatNetwork, flatten
from utils.core.errors import UserError
from utils.experts.kind import ExpertKind

DIGITS = {"channels": 1, "num_classes": 10, "image_size": 8}
SMALL = {"channels": 3, "num_classes": 7, "image_size": 32}


def own(name):
    return f"own_nets:{name}"


@pytest.mark.parametrize("model", ["os:kill", "a.b:C.D", "torchvision:resnet18", "timm:a_b.c-d"])
def test_names_from_elsewhere_are_told_by_their_spelling(model):
    assert is_name(model)
    assert not {*folder_name(model)} & {*'<>:"/\\|?*'}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("ConvNet9", "choices: MLP, .*package.module:Class"),
        ("nets/mine.py:Net", "write mine:Net and call from the folder that mine.py lies in"),
        ("mine.py:Net", "write mine:Net"),
        ("a-b:Net", "is not spelled as package.module:Class"),
        ("mine:", "is not spelled as"),
        ("timm:", "write timm:NAME"),
        ("timm:hf-hub:someone/something", "write timm:NAME"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(model, says):
    assert not is_name(model)
    argv = ["--dataset", "digits", "--model", model]
    for parse in (buffer.parse, distill_att.parse):
        with pytest.raises(UserError, match=f"--model: .*{says}"):
            parse(argv)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nope:Net", "there is no module 'nope' in .*nor is such a package installed"),
        ("torch.nope:Net", "there is no module 'torch.nope'"),
        (own("Nope"), r"there is no Nope in module 'own_nets' \(.*own_nets.py\); .*Small, With"),
        (own("Plain"), "no network .class.: it must be a class derived from torch.nn.Module"),
        (own("make"), "no network .function."),
        ("os:sep", "no network .str."),
        ("torchvision.models:resnet18", "is torchvision:resnet18 meant"),
        ("torchvision:resnet19", "no classifier 'resnet19' .*choices: .*resnet18"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_made(model, says):
    with pytest.raises(UserError, match=f"^--model {model}: .*{says}"):
        check_known([model])


def test_modules_that_fail_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "broken_net.py").write_text("class Net(:\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "of_here.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    for module, says in [
        ("broken_net", "'broken_net' cannot be imported: SyntaxError"),
        ("needs_more", "'needs_more' cannot be imported: .*No module named 'not_installed_at_all'"),
        ("ends", "'ends' cannot be imported: SystemExit: 3"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            check_known([f"{module}:Net"])
        assert "\n" not in str(error.value)
    check_known(["of_here:Net"])  # the current folder is looked into, after all others
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WrongShape", r"answers with shape \(2, 3\) instead of logits of shape \(2, 10\)"),
        ("Pair", "answers with tuple instead of logits"),
        ("OneArgument", r"cannot be made as Class\(.*\) = Class\(1, 10, 8\): TypeError"),
        ("NoParameters", "has no parameters to train"),
        ("NoGradient", "has no gradient at 8x8 pixels"),
        ("Fails", "cannot be used at 8x8 pixels: ValueError: these images$"),
        ("FailsInTests", "cannot be used at 8x8 pixels: ValueError$"),
        ("Leaves", "cannot be used at 8x8 pixels: SystemExit: 3$"),
        ("ChangesImages", "changes the images that it is given"),
        ("Complex", "has the complex parameter phase"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(name, says):
    with pytest.raises(UserError, match=f"--model {own(name)} {says}"):
        network_cost(own(name), **DIGITS)


def test_logits_are_told_from_others_where_images_are_as_many_as_classes():
    with pytest.raises(UserError, match=r"shape \(2, 3\) instead of logits of shape \(3, 2\)"):
        abilities(own("Transposed"), **DIGITS | {"num_classes": 2})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WithDropout", "answers differently when it is asked twice"),
        ("Remembers", "changes its buffer scale"),
    ],
)
def test_a_network_whose_steps_cannot_be_repeated_is_no_student(name, says, tmp_path):
    assert network_cost(own(name), **DIGITS).parameters == 2610  # for eval.py it is good
    with pytest.raises(UserError, match=says):
        check_repeatable(own(name), **DIGITS)
    for main, more in ((buffer.main, []), (distill_att.main, ["--method", "dm"])):
        path = ["--buffer_path" if main is buffer.main else "--save_path", str(tmp_path / "out")]
        with pytest.raises(UserError, match=says):
            main(["--dataset", "digits", "--model", own(name), *path, *more])
    assert not (tmp_path / "out").exists()


def test_batches_that_end_with_one_image_are_refused_where_batch_norm_cannot_take_it(tmp_path):
    for images, batch in ((10, 4), (1, 4), (10, 1), (9, 4)):
        check_batches(own("Small"), images, batch, **DIGITS)
        if images % batch not in (0, 1):
            check_batches(own("NeedsTwo"), images, batch, **DIGITS)
    where = [
        "--dataset",
        "digits",
        "--model",
        own("NeedsTwo"),
        "--buffer_path",
        str(tmp_path / "b"),
    ]
    with pytest.raises(UserError, match="1437 images in batches of 1436 have one: pass another"):
        buffer.main([*where, "--batch_train", "1436"])
    for flag in ("--batch_syn", "--micro_batch"):
        with pytest.raises(UserError, match=f"10 images in batches of 3 have one: .* {flag}"):
            distill_att.main([*where, "--save_path", str(tmp_path / "b"), flag, "3"])
    assert not (tmp_path / "b").exists()


def test_what_a_network_can_do_is_found():
    for name in ("Small", "Lazy"):
        assert abilities(own(name), **DIGITS).repeats
        assert abilities(own(name), **DIGITS).vectorises
        check_repeatable(own(name), **DIGITS)
    for name in ("LooksAtValues", "Recurrent"):
        assert not abilities(own(name), **DIGITS).vectorises
    with pytest.raises(UntraceableError, match="the compiler cannot follow own_nets:LooksAtValues"):
        check_traceable(own("LooksAtValues"), **DIGITS)
    check_head(own("Small"), **DIGITS, why="dm")
    with pytest.raises(UserError, match=r"last nn.Linear does not give its logits.*--method dm"):
        check_head(own("Headless"), **DIGITS, why="--method dm")


def test_attention_serves_students():
    switches = torch.backends.cuda
    before = switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled()
    try:
        check_repeatable(own("Attention"), **DIGITS)
    finally:
        switches.enable_flash_sdp(before[0])
        switches.enable_mem_efficient_sdp(before[1])


def test_frozen_parameters_are_constants_and_others_follow_the_seed():
    first, second = (build_network(own("Lazy"), **DIGITS, seed=3) for _ in range(2))
    assert [name for name, _ in first.named_parameters()] == [
        *("0.weight", "0.bias", "1.weight", "4.weight", "4.bias")
    ]
    torch.testing.assert_close(flatten(first.parameters()), flatten(second.parameters()))


def test_constants_survive_training_and_pure_calls():
    recipe = Recipe(own("Small"), **DIGITS, momentum=0.9, weight_decay=5e-4)
    cohort = Cohort(recipe, [0], device=torch.device("cpu"), dtype=torch.float32)
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    progress = [
        cohort.train(
            images,
            labels,
            epochs=30,
            lr=0.1,
            batch_size=20,
            dsa_groups=None,
            generators=[torch.Generator()],
        )
        for _ in range(2)
    ]
    assert progress[1].losses < 0.5 * progress[0].losses
    (network,) = cohort.networks
    assert network.order.tolist() == [3, 1, 2, 0] and network.scale.item() == 2
    theta = flatten(network.parameters()).detach()
    expected = network.train()(images)
    torch.testing.assert_close(FlatNetwork(network)(theta, images), expected)


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        ("torchvision:resnet18", 32, "first convolution 3x3 with stride 1, no max-pool behind it"),
        ("torchvision:resnet18", 128, ""),
        ("torchvision:mobilenet_v3_small", 32, "first convolution 3x3 with stride 1"),
        ("torchvision:squeezenet1_1", 8, "first convolution 3x3 with stride 1"),
    ],
)
def test_networks_of_torchvision_are_adapted_to_small_images(model, size, says):
    shape = {"channels": 1, "num_classes": 7, "image_size": size}
    assert elsewhere.adaptation(model, **shape) == says
    logits = build_network(model, **shape, seed=0).eval()(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)


def test_a_network_that_needs_larger_images_sees_them_enlarged(monkeypatch):
    class NeedsMany(nn.Sequential):
        """As VGG11, in little: five poolings."""

        def __init__(self, num_classes):
            pools = [nn.MaxPool2d(2) for _ in range(5)]
            super().__init__(nn.Conv2d(3, 4, 3, padding=1), *pools, nn.Flatten())
            self.append(nn.Linear(4, num_classes))

    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["pools"]
    timm.is_model = lambda name: name == "pools"
    timm.create_model = lambda name, pretrained, num_classes, in_chans: NeedsMany(num_classes)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert elsewhere.adaptation("timm:pools", **DIGITS) == "images enlarged to 32x32"
    assert build_network("timm:pools", **DIGITS)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match=r"timm has no classifier 'poolz' .*choices: pools"):
        check_known(["timm:poolz"])


def test_without_timm_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:resnet18: it needs timm, .*: pip install timm"):
        check_known(["timm:resnet18"])


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_networks_of_timm_are_adapted_to_small_images():
    assert elsewhere.adaptation("timm:vit_tiny_patch16_224", **SMALL) == "img_size 32, patch_size 4"
    assert "stride 1" in elsewhere.adaptation("timm:resnet18", **SMALL)


def test_eval_mode_m_leaves_out_what_does_not_fit():
    models = ("ConvNet", "ResNet18", "VGG11", "AlexNet")
    assert fitting_models(models, **DIGITS) == (
        ["ConvNet", "AlexNet"],
        ["ResNet18 needs 9x9 pixels", "VGG11 needs 32x32 pixels"],
    )
    assert fitting_models(models, **SMALL) == ([*models], [])


def test_a_folder_for_a_network_has_no_colon():
    kind = ExpertKind("digits", None, 8, False, "a.b:Net", "data")
    assert kind.folder("buffers").parts[-1] == "a.b-Net"
    assert "--model a.b:Net" in kind.command("buffers")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The three commands with a network that lies in the current folder, and its folder."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(Path(__file__).with_name("own_nets.py"), folder / "my_nets.py")
    experts = "--dataset digits --model my_nets:Small --num_experts 2 --train_epochs 2".split()
    done = run("buffer.py", *experts, cwd=folder)
    assert done.returncode == 0, done.stderr
    flags = [flag if flag != "ConvNetD1" else "my_nets:Small" for flag in SHORT]
    done = run("distill_att.py", *flags, "--run_name", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_network_of_ones_own_goes_all_the_way(own_run):
    run_dir = own_run / "results/digits/my_nets-Small/ipc1/run"
    assert {record["model"] for record in records(run_dir, "eval")} == {"my_nets:Small"}
    flags = ["--distilled", run_dir / "distilled_best.pt", "--num_eval", 2]
    flags += ["--epoch_eval_train", 2]
    done = run("eval.py", *flags, "--model", "my_nets:Small", "my_nets:WithDropout", cwd=own_run)
    assert done.returncode == 0, done.stderr
    assert "distilled raw  my_nets:WithDropout" in done.stdout
    again = run("eval.py", *flags, cwd=own_run)
    assert "(recorded before)" in again.stdout
    with open(own_run / "my_nets.py", "a") as file:
        file.write("# changed\n")
    again = run("eval.py", *flags, cwd=own_run)
    assert "recorded before" not in again.stdout  # it may be another network by now


def test_a_network_that_was_changed_is_no_match_for_its_experts(own_run):
    text = (own_run / "my_nets.py").read_text()
    (own_run / "my_nets.py").write_text(
        text.replace("(channels, 4, 3, padding=1)\n", "(channels, 5, 3, padding=1)\n")
    )
    try:
        experts = "--dataset digits --model my_nets:Small --num_experts 3 --train_epochs 2".split()
        done = run("buffer.py", *experts, cwd=own_run)
        assert done.returncode == 2 and "begun with parameters=2610, not 2620" in done.stderr
        flags = [flag if flag != "ConvNetD1" else "my_nets:Small" for flag in SHORT]
        done = run("distill_att.py", *flags, "--run_name", "other", cwd=own_run)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    finally:
        (own_run / "my_nets.py").write_text(text)
    assert script.parse(["--distilled", "x", "--model", "my_nets:Small"]).model == ["my_nets:Small"]
