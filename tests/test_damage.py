"""Damaged files and bad input: one UserError of one line, or the very content that was written.

`python -m scripts.faults` tries whole calls with the same damage.
"""

import random
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short_runs import save_expert

from networks import NETWORKS
from scripts.faults.contents import differences
from scripts.faults.damage import (
    HOSTILE_YAML,
    NO_FILES,
    NUMBERS,
    WORDS,
    YAML,
    damaged_bytes,
    flipped,
    replace_by,
    torch_bytes,
    trapped,
)
from utils.compute.flat import flatten
from utils.config.fields import FLOAT_LIMIT, INT_LIMIT, scalar_type
from utils.config.resolve import resolve
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.core.files import torch_load
from utils.data.distilled import SyntheticSet
from utils.data.normalisation import Normalisation
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import Expert
from utils.options import BufferOptions, DistillOptions, EvalOptions

examples = partial(
    settings, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)  # the same in every run
few = examples(max_examples=25)
randoms = st.randoms(use_true_random=False)
NAN, INF = float("nan"), float("inf")


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Leaves, and lists and dictionaries of them."""
    return st.recursive(
        leaves | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )


@contextmanager
def may_refuse(*parts: str) -> Iterator[None]:
    """Let the block end with a UserError of one line, which holds one of the parts given."""
    try:
        yield
    except UserError as error:
        (line,) = str(error).splitlines()
        assert not parts or any(part in line for part in parts)
    except SystemExit as stop:  # --help
        assert stop.code == 0


def assert_same(one: Any, other: Any) -> None:
    """Assert that two contents are equal in structure, types and every bit."""
    assert list(differences(one, other)) == []


# flags and YAML

OPTIONS = [BufferOptions, DistillOptions, EvalOptions]
FLAGS = sorted({f"--{field.name}" for kind in OPTIONS for field in fields(kind)})
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=30)  # no argument holds a NUL
ODD = st.sampled_from([*NUMBERS, *WORDS])
each_script = pytest.mark.parametrize("kind", OPTIONS)


# Valid values of options that a function checks.
CHECKED = {
    "dsa_strategy": st.lists(st.sampled_from("color crop flip".split()), min_size=1).map("_".join),
    "model": st.sampled_from([*NETWORKS, "a.b:Net", "torchvision:resnet18", "timm:vit_tiny"]),
    "device": st.sampled_from(["cpu", "cuda", "cuda:3", "mps"]),
}


def values(field, hint):
    """Valid values of an option."""
    kind, is_list = scalar_type(hint)
    meta = field.metadata
    low, above, high = meta["minimum"], meta["above"], meta["maximum"]
    if meta["choices"] is not None:
        one = st.sampled_from(meta["choices"])
    elif meta["check"] is not None:
        one = CHECKED[field.name]
    elif kind is float:
        least, most = low if above is None else above, FLOAT_LIMIT if high is None else high
        one = st.floats(least, most, exclude_min=above is not None)
    elif kind is int:
        one = st.integers(low, INT_LIMIT - 1 if high is None else high)
    else:
        one = st.booleans() if kind is bool else st.text(string.printable, max_size=20)
    return st.lists(one, min_size=1, max_size=3) if is_list else one


def some_values(kind):
    """Valid values of some of the options, by name."""
    hints = get_type_hints(kind)
    return st.fixed_dictionaries(
        {}, optional={f.name: values(f, hints[f.name]) for f in fields(kind)}
    )


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The options that a command line and the text of a YAML file give."""
    path = tmp_path_factory.mktemp("yaml") / "case.yaml"

    def read(kind, argv=(), text=None):
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = path if text is not None else None
        try:
            return resolve(kind, argv, description="", find_yaml=lambda given: found).options
        except UserError as error:  # which the scripts print in one line
            raise UserError(" ".join(str(error).splitlines())) from error

    return read


def as_flags(given):
    for name, value in given.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={value}"


@each_script
@examples(max_examples=50)
@given(data=st.data())
def test_the_command_line_beats_yaml_beats_the_default(read, kind, data):
    """And what is valid comes back from both as it was."""
    in_yaml, on_line = data.draw(some_values(kind)), data.draw(some_values(kind))
    given = {**in_yaml, **on_line}
    _, presets = kind.presets(given) if hasattr(kind, "presets") else ("", {})
    expected = replace(kind(), **{**presets, **given})
    assert read(kind, list(as_flags(on_line)), yaml.safe_dump(in_yaml)) == expected


@each_script
@few
@given(data=st.data())
def test_any_command_line_is_read_or_refused(read, kind, data):
    words = st.one_of(TEXTS, ODD, st.sampled_from(FLAGS), st.integers().map(str))
    joined = st.tuples(st.sampled_from(FLAGS), words).map("=".join)
    argv = data.draw(st.lists(st.one_of(words, joined), max_size=5))
    with may_refuse():
        read(kind, argv)


@each_script
@few
@given(flag=st.sampled_from(FLAGS), value=st.one_of(TEXTS, ODD))
def test_a_bad_value_is_refused_by_name(read, kind, flag, value):
    with may_refuse(flag, value):
        read(kind, [f"{flag}={value}"])


@pytest.mark.parametrize("value", ["--", "-", "=", "", " "])
@each_script
def test_a_word_that_argparse_may_take_for_its_own_stays_one(read, kind, value):
    for field in fields(kind):
        with may_refuse(field.name):
            assert getattr(read(kind, [f"--{field.name}={value}"]), field.name) in (value, [value])


@few
@given(text=st.one_of(st.text(), st.binary(), st.text("[]{}:-&*!a1\n \t'\"|>?%#", max_size=40)))
def test_any_yaml_is_read_or_refused(read, text):
    encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    with may_refuse("case.yaml"):
        read(DistillOptions, text=encoded)


@few
@given(st.sampled_from([field.name for field in fields(DistillOptions)]), nested(st.dates()))
def test_any_value_in_yaml_is_read_or_refused(read, name, value):
    with may_refuse(f"case.yaml: {name}"):
        read(DistillOptions, text=yaml.safe_dump({name: value}))


@pytest.mark.parametrize("text", YAML, ids=lambda text: f"{text[:20]}")
def test_odd_yaml_is_read_or_refused_by_name_and_hostile_yaml_refused(read, text):
    with may_refuse("case.yaml"):
        read(DistillOptions, text=text)
        assert text not in HOSTILE_YAML


# every file that torch writes

SHAPES = [torch.Size([2, 3]), torch.Size([2])]


def make_expert(seed: int = 0, epochs: int = 1) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(epochs + 1)
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Where damaged files go."""
    return tmp_path_factory.mktemp("damaged") / "replay_buffer_0.pt"


SMALL = torch_bytes({"images": torch.arange(3.0), "syn_lr": 0.02})
TWO = [make_expert(0), make_expert(1)]
WHOLE = torch_bytes(TWO)  # a buffer file


@pytest.mark.parametrize(
    ("content", "step"),
    [(SMALL, 15), pytest.param(WHOLE, 1, marks=pytest.mark.slow)],
    ids=["small", "buffer"],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_any_flipped_bit_is_noticed_or_harmless(path, content, step, mmap):
    path.write_bytes(content)
    expected = torch_load(path)
    for place in range(7 * mmap, 8 * len(content), step):  # in steps of 15 both meet every byte
        path.write_bytes(flipped(content, place // 8, place % 8))
        with may_refuse():
            assert_same(torch_load(path, mmap=mmap), expected)


# buffers


def opened(*args, in_memory, **keywords):
    """A buffer, its files mapped or read into memory."""
    buffer = ExpertBuffer(*args, **keywords)
    if in_memory:
        buffer.read_all()
    return buffer


def assert_holds(buffer: ExpertBuffer, experts: list[Expert]) -> None:
    """`buffer` has exactly these experts, bit for bit."""
    assert len(buffer) == len(experts)
    for i, expert in enumerate(experts):
        found = [buffer.params(i, epoch) for epoch in range(len(expert))]
        assert_same(found, [flatten(snap) for snap in expert])


def with_param(param: torch.Tensor) -> bytes:
    """An expert whose last parameter is another."""
    expert = make_expert()
    expert[-1][-1] = param
    return torch_bytes([expert])


ONE = torch_bytes([make_expert()])
OLD = torch_bytes(TWO, old_format=True)
DAMAGED_BUFFERS = {
    "cut off": ONE[:-300],
    "half": ONE[:900],
    "old, cut off": OLD[:-10],
    "old, half": OLD[:400],
    "one bit flipped": flipped(ONE, ONE.index(make_expert()[1][0].numpy().tobytes())),
    "empty": b"",
    "random": random.Random(0).randbytes(5000),
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    **trapped("marker"),
    "a state dict": torch_bytes({"weight": torch.ones(2, 3)}),
    "no expert": torch_bytes([]),
    "one snapshot only": torch_bytes([make_expert(epochs=0)]),
    "numbers": torch_bytes([[[1.0], [2.0]]]),
    "too large for float32": with_param(torch.tensor([1e300, 1]).double()),
    "another shape": with_param(torch.ones(3)),
    "one parameter more": torch_bytes([[*make_expert(), [torch.ones(2)] * 3]]),
    "whole numbers": with_param(torch.tensor([1, 2])),
    "complex numbers": with_param(torch.tensor([1j, 2])),
    "sparse": with_param(torch.ones(2).to_sparse()),
    "without values": with_param(torch.ones(2, device="meta")),
    "no epochs": torch_bytes([[torch.ones(2, 3), torch.ones(2)]]),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("how", [*DAMAGED_BUFFERS, *NO_FILES])
def test_a_damaged_buffer_is_named_and_skipped_only_if_asked(tmp_path, monkeypatch, how, in_memory):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        save_expert(tmp_path, number, make_expert(number), experts_per_file=1)
    bad = tmp_path / "replay_buffer_1.pt"
    if how in NO_FILES:
        replace_by(how, bad)
    else:
        bad.write_bytes(DAMAGED_BUFFERS[how])
    with pytest.raises(UserError, match=r"replay_buffer_1\.pt .*--skip_bad_buffers") as raised:
        opened(tmp_path, SHAPES, in_memory=in_memory)
    assert "\n" not in str(raised.value)

    buffer = opened(tmp_path, SHAPES, in_memory=in_memory, skip_bad=True)
    assert_holds(buffer, [make_expert(0), make_expert(2)])
    (skipped,) = buffer.skipped
    assert str(raised.value).startswith(skipped)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("how", ["a torch file", "an old torch file"])
def test_the_code_of_these_tests_would_run_if_the_file_were_trusted(tmp_path, how):
    path = tmp_path / "replay_buffer_0.pt"
    path.write_bytes(trapped(tmp_path / "marker")[how])
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists()


@examples(max_examples=150)
@given(randoms, st.booleans())
def test_a_buffer_damaged_at_random_is_refused_or_whole(path, rng, in_memory):
    """And never in the way of the others."""
    path.write_bytes(damaged_bytes(rng, WHOLE))
    with may_refuse():
        assert_same(opened(path.parent, SHAPES, in_memory=in_memory)._experts, TWO)
    other = path.with_name("replay_buffer_1.pt")
    other.write_bytes(WHOLE)
    buffer = ExpertBuffer(path.parent, SHAPES, skip_bad=True)
    other.unlink()
    assert (len(buffer), len(buffer.skipped)) in {(4, 0), (2, 1)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@examples(max_examples=150)
@given(randoms)
def test_a_damaged_buffer_of_the_old_format_ends_in_no_other_error(path, rng):
    """It has no checksums, so it may load as something else: of the right shapes, and finite."""
    path.write_bytes(damaged_bytes(rng, OLD))
    with may_refuse():
        buffer = ExpertBuffer(path.parent, SHAPES)
        for number, expert in enumerate(buffer._experts):
            epochs = range(len(expert))
            assert all(buffer.params(number, epoch).isfinite().all() for epoch in epochs)


@examples(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=4),
    lengths=st.lists(st.integers(2, 4), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    per_file=st.integers(1, 3),
    in_memory=st.booleans(),
)
def test_any_experts_come_back_bit_for_bit(
    tmp_path_factory, shapes, lengths, seed, per_file, in_memory
):
    draws, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("buffers")

    def any_finite(shape: list[int]) -> torch.Tensor:
        values = draws.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        return torch.from_numpy(np.where(np.isfinite(values), values, np.float32(-0.0)))

    written = [[[any_finite(shape) for shape in shapes] for _ in range(n)] for n in lengths]
    for number, expert in enumerate(written):
        save_expert(folder, number, expert, experts_per_file=per_file)
    buffer = opened(folder, [torch.Size(shape) for shape in shapes], in_memory=in_memory)
    assert_holds(buffer, written)
    assert buffer.epochs == min(lengths) - 1


@examples(max_examples=60)
@given(
    number=st.integers(0, 1),
    epoch=st.integers(0, 1),
    place=st.integers(0, 7),
    value=st.sampled_from([NAN, INF, -INF]),
)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(path, number, epoch, place, value):
    experts = [make_expert(0), make_expert(1)]
    experts[number][epoch][place // 6].view(-1)[place % 6] = value
    path.write_bytes(torch_bytes(experts))
    with pytest.raises(UserError, match=f"number {number} of it.* not finite after {epoch} epochs"):
        ExpertBuffer(path.parent, SHAPES)


# distilled sets

CLASSES, SIDE = 3, 4
WHITENED = Normalisation.whitened(1, torch.rand(SIDE**2), torch.rand(SIDE**2, SIDE**2))
CONFIG = {"data_path": "data", "res": SIDE, "dsa": True, "dsa_strategy": "flip", "batch_train": 9}
SET = SyntheticSet(
    images=torch.linspace(-1, 1, CLASSES * SIDE**2).view(CLASSES, 1, SIDE, SIDE),
    labels=torch.arange(CLASSES),
    syn_lr=0.02,
    dataset="folder",
    subset=None,
    model="ConvNetD1",
    ipc=1,
    class_names=("cat", "图片", "it's"),
    normalisation=Normalisation((0.5,), (0.25,)),
    iteration=7,
    set="raw",
    config=CONFIG,
)


def as_values(distilled: SyntheticSet) -> dict[str, Any]:
    return vars(distilled) | {"normalisation": distilled.normalisation.to_dict()}


@examples(max_examples=150)
@given(randoms)
def test_a_damaged_set_is_refused_or_whole(path, rng):
    replace(SET, normalisation=WHITENED).save(path, include_whitening=True)
    expected = as_values(SyntheticSet.load(path))
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    with may_refuse():
        assert_same(as_values(SyntheticSet.load(path)), expected)


@examples(max_examples=60)
@given(
    ipc=st.integers(1, 3),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    side=st.integers(1, 5),
    syn_lr=st.floats(1e-9, 1e9),
    zca=st.booleans(),
)
def test_any_set_comes_back(path, ipc, names, channels, side, syn_lr, zca):
    length = channels * side**2
    whitened = Normalisation.whitened(channels, torch.randn(length), torch.randn(length, length))
    plain = Normalisation((0.5,) * channels, (0.25,) * channels)
    written = replace(
        SET,
        normalisation=whitened if zca else plain,
        images=torch.randn(len(names) * ipc, channels, side, side),
        labels=torch.arange(len(names)).repeat_interleave(ipc),
        syn_lr=syn_lr,
        ipc=ipc,
        class_names=tuple(names),
        config=CONFIG | {"res": side},
    )
    written.save(path, include_whitening=True)
    assert_same(as_values(SyntheticSet.load(path)), as_values(written))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


IMAGES, LABELS = tensor(3, 1, SIDE, SIDE), torch.arange(3)
NOT_IMAGES = [[[1.0]], IMAGES[0], IMAGES[:0], IMAGES.to(torch.uint8), IMAGES * NAN, IMAGES * -INF]
NOT_IMAGES += [tensor(1).expand(3, 1, SIDE, SIDE), IMAGES.to_sparse(), IMAGES.to("meta")]
# What the message says of a value of this name, and such values.
WRONG: list[tuple[str, str, list[Any]]] = [
    ("images", r"images is not a finite float tensor \(N, C, H, W\)", NOT_IMAGES),
    ("images", "it has 4 images and 3 labels", [tensor(4, 1, SIDE, SIDE)]),
    ("images", r"images of \[4, 2\] pixels are not of res 4", [IMAGES[..., :2]]),
    ("images", "mean is for 1 channels instead of 2", [tensor(3, 2, SIDE, SIDE)]),
    ("labels", r"labels is not an int64 tensor \(N,\)", [[0, 1, 2], tensor(3), LABELS[None]]),
    ("labels", "it has 3 images and 4 labels", [torch.arange(4)]),
    ("labels", "labels 1 to 3 are not of 3 classes", [LABELS + 1]),
    ("labels", "labels -1 to 1 are not of 3 classes", [LABELS - 1]),
    ("syn_lr", "syn_lr is not a finite number", [0.0, -1.0, NAN, INF, "1", True, tensor(1)]),
    ("dataset", "dataset is not a known data set", [None, ["digits"], 1, ""]),
    ("subset", "subset is not text or None", [1]),
    ("model", "model is not a known network", [None]),
    ("ipc", "ipc is not a whole number above 0", [0, 1.0, True, None]),
    ("iteration", "iteration is not a whole number", [-1, 0.5, None]),
    ("set", "set is not raw or ema", ["best", None, tensor(2)]),
    ("class_names", "class_names is not a list", ["cat", [], [1, 2], None]),
    ("class_names", "labels 0 to 2 are not of 2 classes", [["cat", "dog"]]),
    ("mean", "mean is not a list of finite", [[NAN], ["0"], 0.5, [], None]),
    ("std", "std is not a list of finite numbers above 0", [[0.0], [INF]]),
    ("std", "std is for 2 channels instead of 1", [[1.0, 1.0]]),
    ("zca", "zca is not true or false", [1]),
    ("zca_mean", r"zca_mean is not a finite float tensor \(D,\)", [tensor(16) * NAN]),
    ("zca_mean", r"zca_mean is \[15\] instead of \[16\]", [tensor(15)]),
    ("zca_mean", "it has one of zca_mean, zca_matrix", [tensor(16)]),
    ("zca_matrix", r"zca_matrix is \[16, 15\] instead of \[16, 16\]", [tensor(16, 15)]),
    ("zca_matrix", "zca_matrix is not a finite float tensor", [None]),
    ("config", "it lacks config.data_path", [None]),
    ("config", "it lacks config.data_path, config.dsa, config.dsa_strategy", [{"res": 4}]),
    ("config.data_path", "config.data_path is not text", [None]),
    ("config.res", r"images of \[4, 4\] pixels are not of res 5", [5]),
    ("config.res", "config.res is not a whole number or None", ["4"]),
    ("config.dsa", "config.dsa is not true or false", [1]),
    ("config.dsa_strategy", "config.dsa_strategy is not text", [None]),
    ("config.batch_train", "config.batch_train is not a whole number above 0", [0]),
    ("rewinds", "rewinds is not a list of dicts", [[1]]),
]


def changed(path: Path, name: str, value: Any) -> None:
    """Write a set to `path` with one of its values replaced."""
    SET.save(path, include_whitening=True)
    content = torch.load(path, weights_only=True)
    place, _, key = f"{name}".rpartition(".")
    (content[place] if place else content)[key] = value
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "message", "value"),
    [(name, message, value) for name, message, values in WRONG for value in values],
)
def test_what_is_wrong_in_a_set_is_said(tmp_path, name, message, value):
    path = tmp_path / "distilled_x.pt"
    changed(path, name, value)
    with pytest.raises(UserError, match=f"_x.pt is not a distilled set: {message}") as raised:
        SyntheticSet.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["rewinds", "zca_mean", "zca_matrix"])
def test_a_set_may_lack_what_older_ones_lack(tmp_path, name):
    path = tmp_path / "distilled_x.pt"
    SET.save(path, include_whitening=True)
    content = torch.load(path, weights_only=True)
    content.pop(name, None)
    torch.save(content, path)
    assert SyntheticSet.load(path).rewinds == ()


TENSORS = st.builds(
    torch.full,
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from([0, 1, 7]),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float16]),
)


@examples(max_examples=200)
@given(st.sampled_from(sorted({name for name, _, _ in WRONG})), nested(TENSORS))
def test_any_value_in_a_set_is_good_or_refused(path, name, value):
    changed(path, name, value)
    with may_refuse(str(path)):
        distilled = SyntheticSet.load(path)
        assert distilled.images.isfinite().all() and distilled.syn_lr > 0
        assert len(distilled.images) == len(distilled.labels)
        assert int(distilled.labels.max()) < len(distilled.class_names)


# caches


def build() -> dict[str, torch.Tensor]:
    return {"images": torch.arange(30, dtype=torch.uint8)}


def with_values(**values: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | values, path)

    return write


SPOILT: dict[str, Callable[[Path], object]] = {
    **{kind: partial(replace_by, kind) for kind in NO_FILES},
    **{
        kind: lambda path, content=content: path.write_bytes(content)
        for kind, content in trapped("marker").items()
    },
    "unreadable": lambda path: path.chmod(0),
    "a list": lambda path: torch.save([1, 2], path),
    "nothing": lambda path: torch.save(None, path),
    "no tensors": with_values(tensors=None),
    "a list of tensors": with_values(tensors=[torch.ones(3)]),
    "numbers": with_values(tensors={"images": 3}),
    "other names": with_values(tensors={"pictures": build()["images"]}),
    "other numbers": with_values(tensors={1: build()["images"]}),
    "another shape": with_values(tensors={"images": build()["images"].view(5, 6)}),
    "a sparse tensor": with_values(tensors={"images": torch.eye(3).to_sparse()}),
    "no checksum": with_values(checksum=None),
    "tensors for a key": with_values(key=torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about some of what it finds
@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_cache_is_rebuilt(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".cache/folder_32_train.pt"
    cached(path, "key", build)
    SPOILT[how](path)
    for _ in range(2):
        assert_same(cached(path, "key", build), build())
    assert not (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@examples(max_examples=150)
@given(randoms)
def test_a_cache_damaged_at_random_is_rebuilt(path, rng):
    path.unlink(missing_ok=True)
    cached(path, "key", build)
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    assert_same(cached(path, "key", build), build())
