"""Expert buffers: the field's files written and read, and all that may be wrong with them."""

import errno
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import save_expert
from torch import nn

from networks import build_network
from utils.compute.flat import flatten
from utils.core.errors import UserError
from utils.experts import buffer as expert_buffer
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import (
    Expert,
    begin,
    buffer_files,
    fill_files,
    keep_expert,
    missing_experts,
    read_file,
    snapshot,
)
from utils.experts.kind import ExpertKind, find_experts

SHAPES = [torch.Size([2, 3]), torch.Size([2])]
LEGACY = {"_use_new_zipfile_serialization": False}
KIND = ExpertKind(
    dataset="CIFAR10", subset=None, res=32, zca=True, model="ConvNetD3", data_path="data"
)


def make_expert(seed: int = 0, epochs: int = 2) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(epochs + 1)
    ]


def write(folder: Path, experts: list[Expert], *, per_file: int = 2) -> Path:
    for number, expert in enumerate(experts):
        save_expert(folder, number, expert, experts_per_file=per_file)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(buffer: ExpertBuffer, experts: list[Expert]) -> None:
    """`buffer` has exactly these experts, bit for bit."""
    assert len(buffer) == len(experts)
    for i, expert in enumerate(experts):
        for epoch, snap in enumerate(expert):
            assert torch.equal(buffer.params(i, epoch), flatten(snap))


def test_a_snapshot_is_not_an_alias():
    network = build_network("MLP", channels=1, num_classes=2, image_size=8, seed=0)
    snap = snapshot(network)
    before = [param.clone() for param in snap]
    assert all(map(torch.equal, snap, network.parameters()))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(torch.ones(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, snap, network.parameters()))
    assert all(map(torch.equal, snap, before))
    assert not any(param.requires_grad for param in snap)


def test_a_file_is_what_the_field_reads(tmp_path):
    """The field's code: torch.load, then an expert by index, an epoch by index, parameters."""
    network = nn.Linear(3, 2)
    path = save_expert(tmp_path / "new", 0, [snapshot(network)] * 2, experts_per_file=1)
    params = torch.load(path)[0][1]
    assert flatten(params).tolist() == flatten(network.parameters()).tolist()
    assert type(params) is list and type(params[0]) is torch.Tensor


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_buffer_of_the_field_is_read(tmp_path, how, in_memory):
    """Written as MTT's buffer.py does, whose snapshots on the CPU all share the last weights."""
    network = build_network("ConvNetW32", channels=3, num_classes=10, image_size=32, seed=0)
    timestamps = [[p.detach().cpu() for p in network.parameters()] for _ in range(3)]
    torch.save([timestamps, timestamps], tmp_path / "replay_buffer_0.pt", **how)
    shapes = [param.shape for param in network.parameters()]
    buffer = ExpertBuffer(tmp_path, shapes)
    if in_memory:
        buffer.read_all()
    assert (len(buffer), buffer.epochs) == (2, 2)
    assert torch.equal(buffer.params(1, 2), flatten(network.parameters()))


def test_files_are_the_fields_own_names_by_number(tmp_path):
    for n in (10, 2, 0):
        torch.save([make_expert(n)], tmp_path / f"replay_buffer_{n}.pt")
    others = ["1.pt.bak", "x.pt", "00.pt", "٣.pt", "-1.pt"]
    for name in [".replay_buffer_3.pt.7.tmp", *(f"replay_buffer_{other}" for other in others)]:
        torch.save([make_expert()], tmp_path / name)
    assert [path.name for path in buffer_files(tmp_path)] == [
        f"replay_buffer_{n}.pt" for n in (0, 2, 10)
    ]
    buffer = ExpertBuffer(tmp_path, SHAPES, skip_bad=True)
    assert_holds(buffer, [make_expert(n) for n in (0, 2, 10)])


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path, [make_expert()])
    path = tmp_path / "replay_buffer_0.pt"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt may not be read: check its perm"):
        ExpertBuffer(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([0, 2], r"replay_buffer_1\.pt is missing, but replay_buffer_2\.pt is there"),
        ([1, 2], r"replay_buffer_0\.pt is missing, but replay_buffer_1\.pt is there"),
        ([0, 5], r"replay_buffer_1\.pt and 3 after it is missing, but replay_buffer_5\.pt is"),
    ],
)
def test_a_file_that_is_missing_between_others_is_named(tmp_path, there, message):
    for n in there:
        torch.save([make_expert(n)], tmp_path / f"replay_buffer_{n}.pt")
    with pytest.raises(UserError, match=message + ".*run buffer.py again.*--skip_bad_buffers"):
        ExpertBuffer(tmp_path, SHAPES)
    buffer = ExpertBuffer(tmp_path, SHAPES, skip_bad=True)
    assert_holds(buffer, [make_expert(n) for n in there])
    (skipped,) = buffer.skipped
    assert re.search(message, skipped)


def test_what_is_not_used_is_not_looked_at(tmp_path):
    experts = [make_expert(n) for n in range(4)]
    write(tmp_path, experts, per_file=2)
    (tmp_path / "replay_buffer_2.pt").write_bytes(b"")
    torch.save([make_expert(9)], tmp_path / "replay_buffer_9.pt")
    assert_holds(ExpertBuffer(tmp_path, SHAPES, max_files=2), experts)
    assert_holds(ExpertBuffer(tmp_path, SHAPES, max_experts=3), experts[:3])
    assert_holds(ExpertBuffer(tmp_path, SHAPES, max_files=1, max_experts=5), experts[:2])
    with pytest.raises(UserError, match=r"replay_buffer_2\.pt is damaged"):
        ExpertBuffer(tmp_path, SHAPES, max_experts=5)
    buffer = ExpertBuffer(tmp_path, SHAPES, max_experts=5, skip_bad=True)
    assert_holds(buffer, [*experts, make_expert(9)])
    assert len(buffer.skipped) == 2


def test_files_are_read_ahead_but_kept_in_order(tmp_path, monkeypatch):
    experts = [make_expert(n) for n in range(12)]
    write(tmp_path, experts, per_file=1)
    read, first_may_go = expert_buffer.read_file, threading.Event()

    def wait_with_the_first(path: Path) -> list[Expert]:
        if path.name == "replay_buffer_0.pt":
            assert first_may_go.wait(timeout=60)
        if path.name == "replay_buffer_5.pt":
            first_may_go.set()
        return read(path)

    monkeypatch.setattr(expert_buffer, "read_file", wait_with_the_first)
    assert_holds(ExpertBuffer(tmp_path, SHAPES), experts)


def test_without_any_usable_file_there_is_no_buffer(tmp_path):
    for n in range(5):
        (tmp_path / f"replay_buffer_{n}.pt").write_bytes(b"")
    expected = r"no usable expert buffer in .*replay_buffer_0\.pt.*; and 2 more$"
    with pytest.raises(UserError, match=expected):
        ExpertBuffer(tmp_path, SHAPES, skip_bad=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (5,)], r"parameter 1 is \(2,\) where the model has \(5,\)"),
        ([(7, 3), (2,)], r"parameter 0 is \(2, 3\) where the model has \(7, 3\)"),
        ([(2, 3)], "2 parameter tensors where the model has 1"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_another_architecture_is_refused(tmp_path, shapes, message, skip_bad):
    write(tmp_path, [make_expert()])
    with pytest.raises(UserError, match=rf"replay_buffer_0\.pt is of another.*: {message}"):
        ExpertBuffer(tmp_path, [torch.Size(shape) for shape in shapes], skip_bad=skip_bad)


def test_files_are_memory_mapped_until_all_is_read(tmp_path):
    torch.save([make_expert()], tmp_path / "replay_buffer_0.pt")
    buffer = ExpertBuffer(tmp_path, SHAPES)

    def are_mapped():  # a mapping has the size that it has
        snaps = buffer._experts[0]
        return {not param.untyped_storage().resizable() for snap in snaps for param in snap}

    assert are_mapped() == {True}
    buffer.read_all()
    assert are_mapped() == {False}
    assert_holds(buffer, [make_expert()])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_nothing_half_written_stays(tmp_path, monkeypatch, error):
    experts = [make_expert(seed) for seed in range(4)]
    write(tmp_path, experts[:3], per_file=2)
    keep_expert(tmp_path, 3, experts[3])
    before = names(tmp_path)

    def fail(content, file):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            keep_expert(tmp_path, 4, make_expert(9))
        with pytest.raises((UserError, KeyboardInterrupt)):
            fill_files(tmp_path, range(4), experts_per_file=2)
    assert names(tmp_path) == before
    assert_holds(ExpertBuffer(tmp_path, SHAPES), experts[:3])
    fill_files(tmp_path, range(4), experts_per_file=2)
    assert_holds(ExpertBuffer(tmp_path, SHAPES), experts)


def test_a_file_is_written_once_when_its_last_expert_is_there(tmp_path):
    experts = [make_expert(seed) for seed in range(5)]
    of_their_own = []
    for number in (1, 0, 2, 3, 4):
        keep_expert(tmp_path, number, experts[number])
        fill_files(tmp_path, range(5), experts_per_file=3)
        of_their_own.append([name for name in names(tmp_path) if name.startswith("finished")])
    first, second, fourth = (f"finished_expert_{n}.pt" for n in (0, 1, 3))
    assert of_their_own == [[second], [first, second], [], [fourth], []]
    assert [len(read_file(path)) for path in buffer_files(tmp_path)] == [3, 2]
    assert_holds(ExpertBuffer(tmp_path, SHAPES), experts)


def test_a_file_of_fewer_experts_is_continued(tmp_path):
    experts = [make_expert(seed) for seed in range(4)]
    write(tmp_path, experts[:1], per_file=3)
    for number in (1, 2, 3):
        assert_holds(ExpertBuffer(tmp_path, SHAPES), experts[:1])
        keep_expert(tmp_path, number, experts[number])
        if number < 3:
            assert missing_experts(tmp_path, range(4), experts_per_file=3) == [2, 3][number - 1 :]
    fill_files(tmp_path, range(4), experts_per_file=3)
    assert_holds(ExpertBuffer(tmp_path, SHAPES), experts)
    keep_expert(tmp_path, 1, experts[1])  # as where a kill came before it was removed
    fill_files(tmp_path, range(4), experts_per_file=3)
    assert names(tmp_path) == ["replay_buffer_0.pt", "replay_buffer_1.pt"]


def test_a_damaged_file_is_not_replaced(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    path.write_bytes(b"damaged")
    keep_expert(tmp_path, 1, make_expert())
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt is damaged"):
        fill_files(tmp_path, range(2), experts_per_file=2)
    assert path.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("change", "folder", "flags"),
    [
        (
            {},
            "CIFAR10/ConvNetD3",
            "--dataset CIFAR10 --model ConvNetD3 BUFFERS --data_path data --zca",
        ),
        ({"zca": False}, "CIFAR10_NO_ZCA/ConvNetD3", "data_path data"),
        ({"dataset": "CIFAR100"}, "CIFAR100/ConvNetD3", "--data_path data --zca"),
        ({"dataset": "Tiny", "res": 64}, "Tiny_ZCA/ConvNetD3", "--data_path data --zca"),
        (
            {"dataset": "Tiny", "res": 32, "zca": False, "model": "ConvNetD4"},
            "Tiny/32/ConvNetD4",
            "--dataset Tiny --res 32 --model ConvNetD4 BUFFERS --data_path data",
        ),
        (
            {"dataset": "ImageNet", "subset": "imagewoof", "res": 128, "zca": False},
            "ImageNet/imagewoof/128/ConvNetD3",
            "--dataset ImageNet --subset imagewoof --res 128 --model ConvNetD3 BUFFERS "
            "--data_path data",
        ),
        ({"dataset": "digits", "res": 8}, "digits_ZCA/ConvNetD3", "--data_path data --zca"),
        (
            {"dataset": "folder", "res": 48, "zca": False, "data_path": "/my pictures/birds/"},
            "folder/birds/48/ConvNetD3",
            "--dataset folder --res 48 --model ConvNetD3 BUFFERS --data_path '/my pictures/birds/'",
        ),
        ({"flat": True}, "CIFAR10_FLAT/ConvNetD3", "--data_path data --zca --flat"),
        (
            {"flat": True, "easy_first": True},
            "CIFAR10_FLAT_EASY_FIRST/ConvNetD3",
            "--data_path data --zca --flat --easy_first",
        ),
        (
            {"zca": False, "flat": True, "val_fraction": 0.1},
            "CIFAR10_NO_ZCA_FLAT_VAL0.1/ConvNetD3",
            "--data_path data --val_fraction 0.1 --flat",
        ),
        (
            {"dataset": "digits", "res": 16, "zca": False, "val_fraction": 0.25},
            "digits_VAL0.25/16/ConvNetD3",
            "--data_path data --val_fraction 0.25",
        ),
    ],
)
def test_each_kind_has_a_folder_and_a_command_that_is_named_where_it_is_empty(
    tmp_path, change, folder, flags
):
    kind, buffers = replace(KIND, **change), tmp_path / "my buffers"
    assert kind.folder(str(buffers)) == buffers / folder
    (buffers / folder).mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        find_experts(str(buffers), kind, model_fixed=True, zca_fixed=True)
    words = f"{buffers / folder}; make them with: python buffer.py --dataset {kind.dataset} "
    assert words in str(raised.value)
    assert str(raised.value).endswith(flags.replace("BUFFERS", f"--buffer_path '{buffers}'"))


@pytest.mark.parametrize(
    ("there", "fixed", "expected"),
    [
        # exactly what was asked for, before all else
        (["CIFAR10/ConvNetD3", "CIFAR10/ConvNet"], "", {}),
        (["CIFAR10/ConvNetD3", "CIFAR10_NO_ZCA/ConvNetD3"], "", {}),
        # the other name of the architecture, even where the model is fixed
        (["CIFAR10/ConvNet"], "model zca", {"model": "ConvNet"}),
        (["CIFAR10/ConvNet", "CIFAR10_NO_ZCA/ConvNetD3"], "", {"model": "ConvNet"}),
        # another zca, before another model
        (["CIFAR10_NO_ZCA/ConvNetD3"], "model", {"zca": False}),
        (["CIFAR10_NO_ZCA/ConvNet"], "model", {"zca": False, "model": "ConvNet"}),
        (["CIFAR10_NO_ZCA/ConvNet", "CIFAR10/MLP"], "", {"zca": False, "model": "ConvNet"}),
        (["CIFAR10_NO_ZCA/ConvNetD3"], "zca", None),
        # another model
        (["CIFAR10/MLP"], "zca", {"model": "MLP"}),
        (["CIFAR10_NO_ZCA/MLP"], "", {"zca": False, "model": "MLP"}),
        (["CIFAR10/MLP", "CIFAR10_NO_ZCA/MLP"], "", {"model": "MLP"}),
        (["CIFAR10/MLP"], "model", None),
        # another data set is never taken, nor other training
        (["CIFAR10_FLAT/ConvNetD3", "CIFAR10_VAL0.1/ConvNetD3"], "", None),
        (["CIFAR10_FLAT/ConvNetD3", "CIFAR10_EASY_FIRST/ConvNetD3"], "", None),
        (["CIFAR100/ConvNetD3"], "", None),
    ],
)
def test_experts_are_found(tmp_path, there, fixed, expected):
    for folder in there:
        write(tmp_path / folder, [make_expert()])

    def find() -> ExpertKind:
        return find_experts(
            str(tmp_path), KIND, model_fixed="model" in fixed, zca_fixed="zca" in fixed
        )

    if expected is None:
        with pytest.raises(UserError, match=r"no expert buffers in .*CIFAR10/ConvNetD3[;,].*make"):
            find()
    else:
        assert find() == replace(KIND, **expected)


def test_experts_without_a_whole_file_name_the_command_that_goes_on(tmp_path):
    for number in range(2):
        keep_expert(KIND.folder(str(tmp_path)), number, make_expert())
    match = r"no buffer file .* yet, where 2 experts are .*go on with: python buffer\.py .*--zca"
    with pytest.raises(UserError, match=match):
        find_experts(str(tmp_path), KIND, model_fixed=False, zca_fixed=False)


def test_other_settings_are_refused_naming_both_values(tmp_path):
    settings = {"lr_teacher": 0.01, "subset": None, "dsa": True}
    begin(tmp_path, settings)
    write(tmp_path, [make_expert()])
    begin(tmp_path, settings)
    for name, value in [("lr_teacher", 0.1), ("subset", "imagewoof"), ("dsa", False)]:
        with pytest.raises(UserError, match=f"with {name}={settings[name]}, not {value}: pass"):
            begin(tmp_path, {**settings, name: value})
    assert json.loads((tmp_path / "experts.json").read_text()) == settings


def test_settings_bind_nobody_before_the_first_expert(tmp_path):
    begin(tmp_path, {"lr_teacher": 0.01})
    begin(tmp_path, {"lr_teacher": 0.1})
    assert json.loads((tmp_path / "experts.json").read_text()) == {"lr_teacher": 0.1}
    keep_expert(tmp_path, 0, make_expert())
    with pytest.raises(UserError, match=r"lr_teacher=0.1, not 0.01"):
        begin(tmp_path, {"lr_teacher": 0.01})
    assert (tmp_path / "finished_expert_0.pt").exists()


@pytest.mark.parametrize(
    ("content", "refusal"),
    [(content, r"experts\.json holds no settings as JSON") for content in ("{", "[]", "")]
    + [(None, r"not from this buffer.*another --buffer_path")],  # from elsewhere
)
def test_experts_of_unknown_settings_are_not_added_to(tmp_path, content, refusal):
    write(tmp_path, [make_expert()])
    if content is not None:
        (tmp_path / "experts.json").write_text(content)
    before = names(tmp_path)
    with pytest.raises(UserError, match=refusal):
        begin(tmp_path, {"lr_teacher": 0.01})
    assert names(tmp_path) == before


def test_missing_experts_are_those_of_missing_and_short_files(tmp_path):
    assert missing_experts(tmp_path, range(3), experts_per_file=2) == [0, 1, 2]
    write(tmp_path, [make_expert(n) for n in range(5)], per_file=2)
    assert missing_experts(tmp_path, range(5), experts_per_file=2) == []
    assert missing_experts(tmp_path, range(4), experts_per_file=2) == []
    assert missing_experts(tmp_path, range(8), experts_per_file=2) == [5, 6, 7]
    (tmp_path / "replay_buffer_1.pt").unlink()
    assert missing_experts(tmp_path, range(6), experts_per_file=2) == [2, 3, 5]


@pytest.mark.parametrize("name", ["replay_buffer_1.pt", "finished_expert_2.pt"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"{name} is damaged.*delete it"):
        missing_experts(tmp_path, range(4), experts_per_file=2)


def test_parameters_that_are_not_finite_are_named(tmp_path):
    expert = make_expert()
    expert[1][0][0] = float("nan")
    write(tmp_path, [make_expert(), expert])
    with pytest.raises(UserError, match=r"number 1 of it, .* not finite after 1 epochs.*lr_teach"):
        ExpertBuffer(tmp_path, SHAPES)


def test_a_segment_and_one_that_does_not_move(tmp_path):
    moving, still = make_expert(), [make_expert()[0]] * 3
    buffer = ExpertBuffer(write(tmp_path, [moving, still]), SHAPES)
    theta_0, theta_star = buffer.segment(0, 1, 1)
    assert torch.equal(theta_0, flatten(moving[1]))
    assert torch.equal(theta_star, flatten(moving[2]))
    with pytest.raises(UserError, match=r"expert 1 .* the same after 0 and after 2 epochs"):
        buffer.segment(1, 0, 2)
