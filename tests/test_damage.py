"""Damaged files and bad input: one UserError of one line, or the very content that was written.

`python -m scripts.faults` tries whole calls with the same damage.
"""

import random
import string
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short_runs import save_expert

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
from utils.config.fields import FLOAT_LIMIT, INT_LIMIT
from utils.config.resolve import resolve
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save
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


def same(one: Any, other: Any) -> bool:
    """Whether two contents of files are equal in structure, types and every bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def is_refused(read: Callable[[], Any], *parts: str) -> bool:
    """Whether it raises a UserError: of one line that holds one of the parts, if some are given."""
    try:
        read()
    except UserError as error:
        said = " ".join(str(error).splitlines())
        assert said
        assert not parts or any(part in said for part in parts)
        return True
    except SystemExit as stop:  # --help
        assert stop.code == 0
    return False


def assert_equal_or_refused(load: Callable[[], Any], expected: Any) -> None:
    try:
        content = load()
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert same(content, expected)


# flags and YAML

OPTIONS = [BufferOptions, DistillOptions, EvalOptions]
FLAGS = sorted({f"--{field.name}" for kind in OPTIONS for field in fields(kind)})
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=30)  # no argument holds a NUL
ODD = st.sampled_from([*NUMBERS, *WORDS])
each_script = pytest.mark.parametrize("kind", OPTIONS)


def values(field):
    """Valid values of an option."""
    one = single_values(field)
    return st.lists(one, min_size=1, max_size=3) if "list" in str(field.type) else one


def single_values(field):
    meta = field.metadata
    if meta["choices"] is not None:
        return st.sampled_from(meta["choices"])
    if "bool" in str(field.type):
        return st.booleans()
    low, above, high = meta["minimum"], meta["above"], meta["maximum"]
    if "int" in str(field.type):
        return st.integers(low, INT_LIMIT - 1 if high is None else high)
    if "float" in str(field.type):
        return st.floats(
            low if above is None else above,
            FLOAT_LIMIT if high is None else high,
            exclude_min=above is not None,
        )
    if meta["check"] is not None:
        return st.lists(st.sampled_from("color crop flip".split()), min_size=1).map("_".join)
    return st.text(string.printable, max_size=20)


def some_values(kind):
    """Valid values of some of the options, by name."""
    return st.fixed_dictionaries({}, optional={f.name: values(f) for f in fields(kind)})


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The options that a command line and the text of a YAML file give."""
    path = tmp_path_factory.mktemp("yaml") / "case.yaml"

    def read(kind, argv=(), text=None):
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = path if text is not None else None
        return resolve(kind, argv, description="", find_yaml=lambda given: found).options

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
    is_refused(lambda: read(kind, argv))


@each_script
@few
@given(flag=st.sampled_from(FLAGS), value=st.one_of(TEXTS, ODD))
def test_a_bad_value_is_refused_by_name(read, kind, flag, value):
    is_refused(lambda: read(kind, [f"{flag}={value}"]), flag, value)


@pytest.mark.parametrize("value", ["--", "-", "=", "", " "])
@each_script
def test_a_word_that_argparse_may_take_for_its_own_stays_one(read, kind, value):
    for field in fields(kind):
        try:
            found = getattr(read(kind, [f"--{field.name}={value}"]), field.name)
        except UserError as error:
            assert field.name in str(error)
        else:
            assert found == value


@few
@given(text=st.one_of(st.text(), st.binary(), st.text("[]{}:-&*!a1\n \t'\"|>?%#", max_size=40)))
def test_any_yaml_is_read_or_refused(read, text):
    encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    is_refused(lambda: read(DistillOptions, text=encoded), "case.yaml")


@few
@given(st.sampled_from([field.name for field in fields(DistillOptions)]), nested(st.dates()))
def test_any_value_in_yaml_is_read_or_refused(read, name, value):
    text = yaml.safe_dump({name: value})
    is_refused(lambda: read(DistillOptions, text=text), f"case.yaml: {name}")


@pytest.mark.parametrize("text", YAML, ids=lambda text: f"{text[:20]}")
def test_odd_yaml_is_read_or_refused_by_name_and_hostile_yaml_refused(read, text):
    refused = is_refused(lambda: read(DistillOptions, text=text), "case.yaml")
    assert refused or text not in HOSTILE_YAML


# every file that torch writes

SHAPES = [torch.Size([2, 3]), torch.Size([2])]


def make_expert(seed: int = 0, epochs: int = 1) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(epochs + 1)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A buffer file of two small experts."""
    path = tmp_path_factory.mktemp("whole") / "replay_buffer_0.pt"
    torch_save([make_expert(0), make_expert(1)], path)
    return path


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Where a damaged copy of it goes."""
    return tmp_path_factory.mktemp("copy") / "replay_buffer_0.pt"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch_save({"images": torch.arange(3.0), "syn_lr": 0.02}, path)
    return path


def test_any_flipped_bit_of_a_small_file_is_noticed_or_harmless(small):
    """Of each byte one bit; the slow test tries them all."""
    content, expected, damaged = small.read_bytes(), torch_load(small), small.with_name("damaged")
    for place in range(len(content)):
        damaged.write_bytes(flipped(content, place, place * 5 % 8))
        load = partial(torch_load, damaged, mmap=place % 2 == 0)
        assert_equal_or_refused(load, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [False, True])
def test_any_flipped_bit_is_noticed_or_harmless(whole, copy, mmap):
    content, expected = whole.read_bytes(), torch_load(whole)
    for place in range(len(content)):
        for bit in range(8):
            copy.write_bytes(flipped(content, place, bit))
            assert_equal_or_refused(partial(torch_load, copy, mmap=mmap), expected)


def test_a_flipped_bit_of_any_value_is_noticed(whole, copy):
    """The damage that nothing but a checksum can see."""
    content = whole.read_bytes()
    tensors = [param for expert in torch_load(whole) for snap in expert for param in snap]
    for tensor in tensors:
        place = content.index(tensor.numpy().tobytes())
        for byte in range(4 * tensor.numel()):
            copy.write_bytes(flipped(content, place + byte))
            with pytest.raises(UserError, match=r"is damaged \(record 'data/\d' does not match"):
                torch_load(copy)


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
        assert all(same(buffer.params(i, k), flatten(snap)) for k, snap in enumerate(expert))


def with_param(param: torch.Tensor) -> bytes:
    """An expert whose last parameter is another."""
    expert = make_expert()
    expert[-1][-1] = param
    return torch_bytes([expert])


ONE = torch_bytes([make_expert()])
OLD = torch_bytes([make_expert(0), make_expert(1)], old_format=True)
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
    "not a number": with_param(torch.tensor([1, NAN])),
    "infinite": with_param(torch.tensor([-INF, 1])),
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


def test_damage_is_described_with_what_to_do(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    path.write_bytes(DAMAGED_BUFFERS["one bit flipped"])
    with pytest.raises(UserError) as raised:
        ExpertBuffer(tmp_path, SHAPES)
    assert str(raised.value) == (
        f"buffer file {path} is damaged (record 'data/2' does not match its checksum); "
        "delete it and run buffer.py again, or pass --skip_bad_buffers"
    )


@examples(max_examples=150)
@given(randoms, st.booleans())
def test_a_buffer_damaged_at_random_is_refused_or_whole(whole, copy, rng, in_memory):
    """And never in the way of the others."""
    copy.write_bytes(damaged_bytes(rng, whole.read_bytes()))
    other = copy.with_name("replay_buffer_1.pt")
    other.unlink(missing_ok=True)

    def load() -> list[Expert]:
        return opened(copy.parent, SHAPES, in_memory=in_memory)._experts

    assert_equal_or_refused(load, torch_load(whole))
    other.write_bytes(whole.read_bytes())
    buffer = ExpertBuffer(copy.parent, SHAPES, skip_bad=True)
    other.unlink()
    assert (len(buffer), len(buffer.skipped)) in {(4, 0), (2, 1)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@examples(max_examples=150)
@given(randoms)
def test_a_damaged_buffer_of_the_old_format_ends_in_no_other_error(copy, rng):
    """It has no checksums, so it may load as something else: of the right shapes, and finite."""
    copy.write_bytes(damaged_bytes(rng, OLD))
    try:
        buffer = ExpertBuffer(copy.parent, SHAPES)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        for number, expert in enumerate(buffer._experts):
            epochs = range(len(expert))
            assert all(buffer.params(number, epoch).isfinite().all() for epoch in epochs)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[list[torch.Size], list[Expert]]:
    """Some experts of a random architecture, of any values that are finite."""
    sides = st.lists(st.integers(1, 4), max_size=4)
    shapes = [torch.Size(shape) for shape in draw(st.lists(sides, min_size=1, max_size=4))]
    draws = np.random.default_rng(draw(st.integers(0, 10**6)))

    def bits(shape: torch.Size) -> torch.Tensor:
        values = draws.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        return torch.from_numpy(np.where(np.isfinite(values), values, np.float32(-0.0)))

    lengths = draw(st.lists(st.integers(2, 4), min_size=1, max_size=5))
    return shapes, [[[bits(shape) for shape in shapes] for _ in range(n)] for n in lengths]


@examples(max_examples=60)
@given(buffers(), st.integers(1, 3), st.booleans())
def test_any_experts_come_back_bit_for_bit(tmp_path_factory, experts, per_file, in_memory):
    shapes, written = experts
    folder = tmp_path_factory.mktemp("buffers")
    for number, expert in enumerate(written):
        save_expert(folder, number, expert, experts_per_file=per_file)
    buffer = opened(folder, shapes, in_memory=in_memory)
    assert_holds(buffer, written)
    assert buffer.epochs == min(map(len, written)) - 1


@examples(max_examples=60)
@given(st.integers(0, 7), st.sampled_from([NAN, INF, -INF]), st.data())
def test_a_value_that_is_not_finite_is_found_wherever_it_is(copy, place, value, data):
    experts = [make_expert(0), make_expert(1)]
    number, epoch = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    snap = experts[number][epoch]
    snap[place // 6].view(-1)[place % 6] = value
    torch_save(experts, copy)
    with pytest.raises(UserError, match=f"number {number} of it.* not finite after {epoch} epochs"):
        ExpertBuffer(copy.parent, SHAPES)


# distilled sets

CLASSES, SIDE = 3, 4
MEAN_STD = Normalisation((0.5,), (0.25,))
WHITENED = Normalisation.whitened(1, torch.rand(SIDE**2), torch.rand(SIDE**2, SIDE**2))


def make_set(normalisation: Normalisation = MEAN_STD, **changes: Any) -> SyntheticSet:
    values = {
        "images": torch.linspace(-1, 1, CLASSES * SIDE**2).view(CLASSES, 1, SIDE, SIDE),
        "labels": torch.arange(CLASSES),
        "syn_lr": 0.02,
        "dataset": "folder",
        "subset": None,
        "model": "ConvNetD1",
        "ipc": 1,
        "class_names": ("cat", "图片", "it's"),
        "normalisation": normalisation,
        "iteration": 7,
        "set": "raw",
        "config": {
            "data_path": "data",
            "res": SIDE,
            "dsa": True,
            "dsa_strategy": "flip",
            "batch_train": 9,
        },
    }
    return SyntheticSet(**values | changes)


@pytest.fixture(scope="module")
def set_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("set") / "distilled_best.pt"
    make_set(WHITENED).save(path, include_whitening=True)
    return path


def as_values(distilled: SyntheticSet) -> dict[str, Any]:
    return vars(distilled) | {"normalisation": distilled.normalisation.to_dict()}


@examples(max_examples=150)
@given(randoms)
def test_a_damaged_set_is_refused_or_whole(set_file, rng):
    expected = as_values(SyntheticSet.load(set_file))
    damaged = set_file.with_name("damaged.pt")
    damaged.write_bytes(damaged_bytes(rng, set_file.read_bytes()))
    assert_equal_or_refused(lambda: as_values(SyntheticSet.load(damaged)), expected)


@examples(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    ipc=st.integers(1, 3),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    side=st.integers(1, 5),
    syn_lr=st.floats(1e-9, 1e9),
    zca=st.booleans(),
)
def test_any_set_comes_back(tmp_path_factory, seed, ipc, names, channels, side, syn_lr, zca):
    path = tmp_path_factory.getbasetemp() / "distilled_x.pt"
    generator = torch.Generator().manual_seed(seed)
    length = channels * side**2
    whitening = [torch.randn(shape, generator=generator) for shape in ([length], [length] * 2)]
    plain = Normalisation((0.5,) * channels, (0.25,) * channels)
    written = make_set(
        Normalisation.whitened(channels, *whitening) if zca else plain,
        images=torch.randn(len(names) * ipc, channels, side, side, generator=generator),
        labels=torch.arange(len(names)).repeat_interleave(ipc),
        syn_lr=syn_lr,
        ipc=ipc,
        class_names=tuple(names),
        config=make_set().config | {"res": side},
    )
    written.save(path, include_whitening=True)
    assert same(as_values(SyntheticSet.load(path)), as_values(written))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


WRONG: list[tuple[str, Any, str]] = [
    ("images", [[1.0]], r"images is not a finite float tensor \(N, C, H, W\)"),
    ("images", tensor(3, SIDE, SIDE), "images is not"),
    ("images", tensor(3, 1, SIDE, SIDE, dtype=torch.uint8), "images is not"),
    ("images", tensor(3, 1, SIDE, SIDE) * NAN, "images is not a finite"),
    ("images", tensor(3, 1, SIDE, SIDE) * -INF, "images is not a finite"),
    ("images", tensor(0, 1, SIDE, SIDE), "images is not"),
    ("images", tensor(1).expand(3, 1, SIDE, SIDE), "images is not"),
    ("images", tensor(3, 1, SIDE, SIDE).to_sparse(), "images is not"),
    ("images", tensor(3, 1, SIDE, SIDE).to("meta"), "images is not"),
    ("images", tensor(4, 1, SIDE, SIDE), "it has 4 images and 3 labels"),
    ("images", tensor(3, 1, SIDE, 2), r"images of \[4, 2\] pixels are not of res 4"),
    ("images", tensor(3, 2, SIDE, SIDE), "mean is for 1 channels instead of 2"),
    ("labels", [0, 1, 2], r"labels is not an int64 tensor \(N,\)"),
    ("labels", torch.arange(3.0), "labels is not"),
    ("labels", torch.arange(3)[None], "labels is not"),
    ("labels", torch.arange(4), "it has 3 images and 4 labels"),
    ("labels", torch.tensor([0, 1, 3]), "labels 0 to 3 are not of 3 classes"),
    ("labels", torch.tensor([0, -1, 2]), "labels -1 to 2 are not of 3 classes"),
    *[("syn_lr", value, "syn_lr is not a finite") for value in (0.0, -1.0, NAN, INF, "1", True)],
    ("syn_lr", tensor(1), "syn_lr is not a finite number above 0"),
    *[("dataset", value, "dataset is not a known data set") for value in (None, ["digits"], 1, "")],
    ("subset", 1, "subset is not text or None"),
    ("model", None, "model is not a known network"),
    *[("ipc", value, "ipc is not a whole number above 0") for value in (0, 1.0, True, None)],
    *[("iteration", value, "iteration is not a whole number") for value in (-1, 0.5, None)],
    *[("set", value, "set is not raw or ema") for value in ("best", None, tensor(2))],
    *[("class_names", value, "class_names is not a list") for value in ("cat", [], [1, 2], None)],
    ("class_names", ["cat", "dog"], "labels 0 to 2 are not of 2 classes"),
    *[("mean", value, "mean is not a list of finite") for value in ([NAN], ["0"], 0.5, [], None)],
    *[("std", value, "std is not a list of finite numbers above 0") for value in ([0.0], [INF])],
    ("std", [1.0, 1.0], "std is for 2 channels instead of 1"),
    ("zca", 1, "zca is not true or false"),
    ("zca_mean", tensor(16) * NAN, r"zca_mean is not a finite float tensor \(D,\)"),
    ("zca_mean", tensor(15), r"zca_mean is \[15\] instead of \[16\]"),
    ("zca_mean", tensor(16), "it has one of zca_mean, zca_matrix"),
    ("zca_matrix", tensor(16, 15), r"zca_matrix is \[16, 15\] instead of \[16, 16\]"),
    ("zca_matrix", None, "zca_matrix is not a finite float tensor"),
    ("config", None, "it lacks config.data_path"),
    ("config", {"res": 4}, "it lacks config.data_path, config.dsa, config.dsa_strategy"),
    ("config.data_path", None, "config.data_path is not text"),
    ("config.res", 5, r"images of \[4, 4\] pixels are not of res 5"),
    ("config.res", "4", "config.res is not a whole number or None"),
    ("config.dsa", 1, "config.dsa is not true or false"),
    ("config.dsa_strategy", None, "config.dsa_strategy is not text"),
    ("config.batch_train", 0, "config.batch_train is not a whole number above 0"),
    ("rewinds", [1], "rewinds is not a list of dicts"),
]


def changed(path: Path, name: str, value: Any) -> None:
    """Write a set to `path` with one of its values replaced."""
    make_set().save(path, include_whitening=True)
    content = torch.load(path, weights_only=True)
    place, _, key = f"{name}".rpartition(".")
    (content[place] if place else content)[key] = value
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_what_is_wrong_in_a_set_is_said(tmp_path, name, value, message):
    path = tmp_path / "distilled_x.pt"
    changed(path, name, value)
    with pytest.raises(
        UserError, match=rf"distilled_x\.pt is not a distilled set: {message}"
    ) as raised:
        SyntheticSet.load(path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["rewinds", "zca_mean", "zca_matrix"])
def test_a_set_may_lack_what_older_ones_lack(tmp_path, name):
    path = tmp_path / "distilled_x.pt"
    make_set().save(path, include_whitening=True)
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
def test_any_value_in_a_set_is_good_or_refused(tmp_path_factory, name, value):
    path = tmp_path_factory.getbasetemp() / "distilled_x.pt"
    changed(path, name, value)
    try:
        distilled = SyntheticSet.load(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
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
        assert same(cached(path, "key", build), build())
    assert not (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "folder_32_train.pt"
    cached(path, "key", build)
    return path


@examples(max_examples=150)
@given(randoms)
def test_a_cache_damaged_at_random_is_rebuilt(cache_file, rng):
    damaged = cache_file.with_name("damaged.pt")
    damaged.write_bytes(damaged_bytes(rng, cache_file.read_bytes()))
    assert same(cached(damaged, "key", build), build())
