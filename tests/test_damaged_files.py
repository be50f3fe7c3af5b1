"""Files damaged at random: one UserError of one line, or the very content that was written."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short_runs import save_expert

from utils.compute.flat import flatten
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save
from utils.data.distilled import SyntheticSet
from utils.data.normalisation import Normalisation
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import Expert

SHAPES = [torch.Size([2, 3]), torch.Size([2])]
LEGACY = {"_use_new_zipfile_serialization": False}
examples = partial(
    settings, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)  # the same in every run


def opened(*args, in_memory, **keywords):
    """A buffer, its files mapped or read into memory."""
    buffer = ExpertBuffer(*args, **keywords)
    if in_memory:
        buffer.read_all()
    return buffer


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


def assert_equal_or_refused(load: Callable[[], Any], expected: Any) -> None:
    try:
        content = load()
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert same(content, expected)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut off, with bytes flipped, zeroed, put in or taken out."""
    place = draw(st.integers(0, len(content) - 1))
    length = draw(st.sampled_from([1, 2, 4, 8, 12, 16, 40, 100, 1000]))
    before, after = content[:place], content[place:]
    match draw(st.sampled_from(["cut", "flip", "flips", "zero", "insert", "remove", "overwrite"])):
        case "cut":
            return before
        case "flip":
            return before + bytes([after[0] ^ 1 << draw(st.integers(0, 7))]) + after[1:]
        case "flips":
            places = draw(st.lists(st.integers(0, len(content) - 1), min_size=2, max_size=6))
            return bytes(byte ^ (16 if i in places else 0) for i, byte in enumerate(content))
        case "zero":
            return before + bytes(min(length, len(after))) + after[length:]
        case "insert":
            return before + draw(st.binary(min_size=length, max_size=length)) + after
        case "remove":
            return before + after[length:]
        case _:
            return before + draw(st.binary(min_size=1, max_size=length)) + after[length:]


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


# every file that torch writes


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch_save({"images": torch.arange(3.0), "syn_lr": 0.02}, path)
    return path


def test_any_flipped_byte_is_noticed_or_harmless(small):
    content, expected, damaged = small.read_bytes(), torch_load(small), small.with_name("damaged")
    flips = random.Random(0)
    for place, byte in enumerate(content):
        flipped = bytes([byte ^ flips.randrange(1, 256)])
        damaged.write_bytes(content[:place] + flipped + content[place + 1 :])
        load = partial(torch_load, damaged, mmap=place % 2 == 0)
        assert_equal_or_refused(load, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [False, True])
def test_any_flipped_bit_is_noticed_or_harmless(whole, copy, mmap):
    content, expected = whole.read_bytes(), torch_load(whole)
    for place, byte in enumerate(content):
        for bit in range(8):
            flipped = bytes([byte ^ 1 << bit])
            copy.write_bytes(content[:place] + flipped + content[place + 1 :])
            assert_equal_or_refused(partial(torch_load, copy, mmap=mmap), expected)


def test_a_flipped_bit_of_any_value_is_noticed(whole, copy):
    """The damage that nothing but a checksum can see."""
    content = whole.read_bytes()
    for tensor in flatten_all(torch_load(whole)):
        place = content.index(tensor.numpy().tobytes())
        for byte in range(4 * tensor.numel()):
            flipped = bytearray(content)
            flipped[place + byte] ^= 1
            copy.write_bytes(flipped)
            with pytest.raises(UserError, match=r"is damaged \(record 'data/\d' does not match"):
                torch_load(copy)


def flatten_all(experts: list[Expert]) -> list[torch.Tensor]:
    return [param for expert in experts for snap in expert for param in snap]


# buffers


@examples(max_examples=200)
@given(st.data(), st.booleans())
def test_a_damaged_buffer_is_refused_or_whole(whole, copy, data, in_memory):
    copy.write_bytes(data.draw(damage(whole.read_bytes())))

    def load() -> list[Expert]:
        return opened(copy.parent, SHAPES, in_memory=in_memory)._experts

    assert_equal_or_refused(load, torch_load(whole))


@examples(max_examples=100)
@given(st.data())
def test_a_damaged_buffer_is_never_in_the_way_of_the_others(whole, copy, data):
    copy.write_bytes(data.draw(damage(whole.read_bytes())))
    copy.with_name("replay_buffer_1.pt").write_bytes(whole.read_bytes())
    try:
        buffer = ExpertBuffer(copy.parent, SHAPES, skip_bad=True)
        assert (len(buffer), len(buffer.skipped)) in {(4, 0), (2, 1)}
    finally:
        copy.with_name("replay_buffer_1.pt").unlink()


@pytest.fixture(scope="module")
def old_format(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("old") / "old.pt"
    torch.save([make_expert(0), make_expert(1)], path, **LEGACY)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@examples(max_examples=150)
@given(st.data())
def test_a_damaged_buffer_of_the_old_format_ends_in_no_other_error(old_format, copy, data):
    """It has no checksums, so it may load as something else: of the right shapes, and finite."""
    copy.write_bytes(data.draw(damage(old_format)))
    try:
        buffer = ExpertBuffer(copy.parent, SHAPES)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        for number, expert in enumerate(buffer._experts):
            assert all(
                buffer.params(number, epoch).isfinite().all() for epoch in range(len(expert))
            )


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
    assert len(buffer) == len(written)
    for i, expert in enumerate(written):
        assert all(same(buffer.params(i, k), flatten(snap)) for k, snap in enumerate(expert))
    assert buffer.epochs == min(map(len, written)) - 1


@examples(max_examples=60)
@given(st.integers(0, 7), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
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
@given(st.data())
def test_a_damaged_set_is_refused_or_whole(set_file, data):
    expected = as_values(SyntheticSet.load(set_file))
    damaged = set_file.with_name("damaged.pt")
    damaged.write_bytes(data.draw(damage(set_file.read_bytes())))
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


NAN, INF = float("nan"), float("inf")
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


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.builds(
        torch.full,
        st.lists(st.integers(0, 3), max_size=5),
        st.sampled_from([0, 1, 7]),
        dtype=st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float16]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=4,
)


@examples(max_examples=200)
@given(st.sampled_from(sorted({name for name, _, _ in WRONG})), anything)
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


def replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def with_values(**values: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | values, path)

    return write


SPOILT = {
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
    "a link to itself": replace_by_circle,
    "unreadable": lambda path: path.chmod(0),
    "a list": lambda path: torch.save([1, 2], path),
    "nothing": lambda path: torch.save(None, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "no tensors": with_values(tensors=None),
    "a list of tensors": with_values(tensors=[torch.ones(3)]),
    "numbers": with_values(tensors={"images": 3}),
    "other names": with_values(tensors={"pictures": build()["images"]}),
    "other numbers": with_values(tensors={1: build()["images"]}),
    "a sparse tensor": with_values(tensors={"images": torch.eye(3).to_sparse()}),
    "no checksum": with_values(checksum=None),
    "tensors for a key": with_values(key=torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about some of what it finds
@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_cache_is_rebuilt(tmp_path, how):
    path = tmp_path / ".cache/folder_32_train.pt"
    cached(path, "key", build)
    SPOILT[how](path)
    for _ in range(2):
        assert same(cached(path, "key", build), build())


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "folder_32_train.pt"
    cached(path, "key", build)
    return path


@examples(max_examples=150)
@given(st.data())
def test_a_cache_damaged_at_random_is_rebuilt(cache_file, data):
    damaged = cache_file.with_name("damaged.pt")
    damaged.write_bytes(data.draw(damage(cache_file.read_bytes())))
    assert same(cached(damaged, "key", build), build())
