"""The user's own files: all bits and bands train, what differs is said, what cannot be is named."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from short_runs import SHORT

import buffer
import distill_att
import eval as evaluation
from networks import NETWORKS, build_network
from utils.core.errors import UserError
from utils.core.pictures import save_grid
from utils.data import augment
from utils.data.dataset import find_dataset, load_dataset, read_dataset
from utils.data.decode import Decoding, decode
from utils.data.identity import DataIdentity, identity_of
from utils.data.normalisation import fit_mean_std
from utils.plan.need import read_bytes

SIDE = 20
RNG = np.random.default_rng(0)
Save = Callable[[Path, int], None]  # into a class folder, the file of a number


def bits(*shape: int, top: int = 255, kind: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, top, shape, endpoint=True).astype(kind)


def png16(path: Path, values: np.ndarray) -> None:
    """Colours of 16 bits, which Pillow does not write; values (H, W, 3)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def grey(folder: Path, number: int, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    Image.fromarray(bits(*size)).save(folder / f"{number}.png")


def colours(folder: Path, number: int, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    Image.fromarray(bits(*size, 3)).save(folder / f"{number}.png")


def array(folder: Path, number: int, shape=(SIDE, SIDE, 4), kind: type = np.float32) -> None:
    np.save(folder / f"{number}.npy", bits(*shape, top=200).astype(kind))


def tree(root: Path, save: Save, splits="train test", classes="cat dog", count=2) -> Path:
    for split in splits.split():
        for label in classes.split():
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                save(folder, number)
    return root


def find(root: Path, **how):
    return find_dataset("folder", data_path=root, **{"res": SIDE} | how)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        action()
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def pixels(root: Path, **how) -> np.ndarray:
    """Training images (N, C, H, W) as they are read."""
    return find(root, **how).pixels(["train"])["train"].numpy()


# bits


DEEP = {
    "png": lambda path, values: Image.fromarray(values[..., 0]).save(path),
    "pgm": lambda path, values: path.write_bytes(
        b"P5 %d %d 65535\n" % values.shape[1::-1] + values[..., 0].astype(">u2").tobytes()
    ),
    "tif": lambda path, values: tifffile.imwrite(path, values[..., 0], compression="lzw"),
    "npy": lambda path, values: np.save(path, values[..., 0]),
    "colours.png": png16,
    "colours.ppm": lambda path, values: path.write_bytes(
        b"P6 %d %d 65535\n" % values.shape[1::-1] + values.astype(">u2").tobytes()
    ),
    "colours.tif": lambda path, values: tifffile.imwrite(path, values, photometric="rgb"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_twelve_bits_keep_all_their_levels(tmp_path, kind):
    channels = 3 if kind.startswith("colours") else 1
    files = []

    def save(folder: Path, number: int) -> None:
        values = bits(SIDE, SIDE, 3, top=4095, kind=np.uint16)
        DEEP[kind](folder / f"{number}.{kind}", values)
        if folder.parent.name == "train":
            files.append(values[..., :channels])

    tree(tmp_path, save)
    source = find(tmp_path)
    low, high = np.min(files), np.max(files)
    assert source.decoding == Decoding(
        SIDE, channels, low=(float(low),) * channels, high=(float(high),) * channels
    )
    wanted = (np.stack(files).astype(float) - low) / (high - low)
    np.testing.assert_allclose(pixels(tmp_path), wanted.transpose(0, 3, 1, 2), atol=1e-6)
    assert f"values {low} ... {high}, measured on the training images" in source.describe()


def test_the_map_is_that_of_the_training_images_for_all(tmp_path):
    def save(folder: Path, number: int) -> None:
        level = {"train": 100, "test": 400}[folder.parent.name] + number * 100
        Image.fromarray(np.full((SIDE, SIDE), level, np.uint16)).save(folder / f"{number}.png")

    read = find(tree(tmp_path, save)).pixels(["train", "test"])
    assert read["train"][:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert read["test"][:, 0, 0, 0].tolist() == [3, 4, 3, 4]


@pytest.mark.parametrize(("top", "white"), [(900, 1023), (4095, 4095), (9000, 16383)])
def test_deep_files_among_others_become_8_bits_by_the_depth_of_their_sensor(tmp_path, top, white):
    def save(folder: Path, number: int) -> None:
        values = np.full((SIDE, SIDE), top, np.uint16)
        Image.fromarray(values if number else np.full((SIDE, SIDE), 7, np.uint8)).save(
            folder / f"{number}.png"
        )

    read = pixels(tree(tmp_path, save))
    assert read.dtype == np.uint8
    assert np.unique(read).tolist() == [7, top * 255 // white]
    assert f"4 have more than 8 bits, others 8: their values 0 ... {white}" in (
        find(tmp_path).describe()
    )


def test_white_is_zero_and_orientation_of_a_deep_tiff(tmp_path):
    values = bits(SIDE, SIDE, top=4095, kind=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="miniswhite", extratags=[(274, 3, 1, 6, False)]
    )
    read = decode([tmp_path / "a.tif"], Decoding(SIDE, 1, low=(0.0,), high=(65535.0,)))[0, 0]
    wanted = np.rot90(65535 - values.astype(float), -1) / 65535
    np.testing.assert_allclose(read, wanted, atol=1e-6)


# bands


def planar(path: Path, values: np.ndarray) -> None:
    bands = np.moveaxis(values, -1, 0)
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="separate")


BANDS = {
    "as tifffile writes it": tifffile.imwrite,
    "pages": lambda path, values: tifffile.imwrite(
        path, np.moveaxis(values, -1, 0), photometric="minisblack"
    ),
    "samples": lambda path, values: tifffile.imwrite(
        path, values, photometric="minisblack", planarconfig="contig", compression="zlib"
    ),
    "planes": planar,
    "array": lambda path, values: np.save(path.with_suffix(".npy"), values),
}


@pytest.mark.filterwarnings("ignore:.*stored as RGB")
@pytest.mark.parametrize("way", BANDS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bands", [2, 4, 7, 16])
def test_bands_are_channels_as_they_are(tmp_path, bands, kind, way):
    files = []

    def save(folder: Path, number: int) -> None:
        values = bits(SIDE, SIDE, bands).astype(kind)
        BANDS[way](folder / f"{number}.tif", values)
        if folder.parent.name == "train":
            files.append(values.astype(float))

    read, wanted = pixels(tree(tmp_path, save, count=1)), np.stack(files)
    assert read.shape == (2, bands, SIDE, SIDE)
    if kind != np.uint8:
        low, high = wanted.min((0, 1, 2)), wanted.max((0, 1, 2))
        wanted = (wanted - low) / (high - low)
    np.testing.assert_allclose(read, wanted.transpose(0, 3, 1, 2), atol=1e-6)


def test_a_mask_that_is_marked_as_transparency_is_laid_on_white(tmp_path):
    def save(folder: Path, number: int) -> None:
        values = bits(SIDE, SIDE, 4)
        values[..., 3] = 0
        values[:5, :, 3] = 255
        tifffile.imwrite(folder / f"{number}.tif", values)

    read = pixels(tree(tmp_path, save))
    assert read.shape[1] == 3 and (read[:, :, 5:] == 255).all() and (read[:, :, :5] != 255).any()
    assert "4 TIFF have a band marked as transparency: they are laid on white" in (
        find(tmp_path, splits=("test",)).describe()
    )


def test_channels_of_small_values_are_not_flattened():
    """A band of another unit may vary by less than a grey level of the largest."""
    images = torch.rand(50, 2, 4, 4)
    images[:, 1] = images[:, 1] * 1e-4
    fitted = fit_mean_std(images)
    assert fitted.std[1] == pytest.approx(images[:, 1].double().std().item(), rel=1e-2)
    assert fit_mean_std(torch.full((3, 1, 4, 4), 0.3)).std == (1 / 255,)


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_networks_and_augmentation_take_any_number_of_channels(channels):
    images = torch.randn(3, channels, 32, 32)
    for name in ("MLP", "LeNet", "AlexNet", "VGG11", "ResNet18", "ConvNet"):
        assert name in NETWORKS
        network = build_network(name, channels=channels, num_classes=2, image_size=32, seed=0)
        assert network(images).shape == (3, 2)
    for group in augment.parse_strategy(augment.DSA_STRATEGY):
        draw = augment.draw((group,), 3, torch.Generator().manual_seed(0))
        assert augment.apply(images, draw).shape == images.shape


@pytest.mark.parametrize(("channels", "shown"), [(2, [0.5] * 3), (5, [0, 1, 0])])
def test_sheets_show_what_can_be_shown(tmp_path, channels, shown):
    images = torch.zeros(1, channels, 8, 8)
    images[:, 1] = 1
    save_grid(images, tmp_path / "a.png", ipc=1)
    middle = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))[36, 36]
    assert np.abs(middle - 255 * np.array(shown)).max() <= 1


# grey and colours


def test_grey_stays_one_channel_and_stands_among_colours(tmp_path):
    source = find(tree(tmp_path / "a", grey))
    assert source.channels == 1 and "all are grey: networks see 1 channel" in source.describe()
    mixed = tree(tmp_path / "b", lambda f, n: (grey if n else colours)(f, n))
    assert find(mixed).channels == 3 and "4 of 8 are grey" in find(mixed).describe()
    read = pixels(mixed)
    assert (read[1] == read[1, :1]).all() and not (read[0] == read[0, :1]).all()
    wanted = np.asarray(Image.open(mixed / "train/cat/1.png"))
    assert np.array_equal(read[1, 0], wanted)


def test_what_was_made_of_tripled_grey_is_known(tmp_path):
    """Sets of then are measured on the pixels of then; experts and runs are not continued."""
    root = tree(tmp_path, grey)
    now = identity_of(find(root), "data")
    then = identity_of(find(root, pixels={}), "data")
    assert "pixels" not in then.to_dict() and now.to_dict()["pixels"] == {"channels": 1}
    assert DataIdentity.from_dict(now.to_dict()) == now
    read = pixels(root, pixels={})
    assert read.shape[1] == 3 and (read == pixels(root)).all()
    message = refusal(
        lambda: now.check_same_as(then.to_dict(), ("train",), what="run x", advice="mend it")
    )
    assert "pictures read as 1 channel, --fit crop instead of 3 channels, --fit crop" in message
    damaged = now.to_dict() | {"pixels": {"channels": "many"}}
    assert "damaged" in refusal(
        lambda: now.check_same_as(damaged, ("train",), what="run x", advice="mend it")
    )


def test_floats_and_a_folder_val_are_counted(tmp_path):
    """A value takes four bytes in the cache, and val/ is decoded beside the training images."""
    root = tree(tmp_path, array, splits="train test val")
    splits = ("train", "test", "val")
    source = find(root, splits=splits)
    _, (disk,) = read_bytes(source, splits, zca=False, fits=False)
    assert disk.bytes == 12 * 4 * SIDE**2 * 4


# shapes


def test_what_does_not_fit_a_square_is_cut_padded_or_squeezed_as_said(tmp_path):
    left, right = np.zeros((SIDE, SIDE), np.uint8), np.full((SIDE, SIDE), 200, np.uint8)

    def save(folder: Path, number: int) -> None:
        Image.fromarray(np.hstack([left, right + 50, right, left])).save(folder / "a.png")

    root = tree(tmp_path, save, count=1)
    cut, padded, squeezed = (pixels(root, fit=f)[0, 0] for f in ("crop", "pad", "squeeze"))
    assert (cut[:, 1:8] == 250).all() and (cut[:, 12:19] == 200).all()
    assert (padded[:7] == 0).all() and (padded[13:] == 0).all()
    assert padded[10, 6] == 250 and padded[10, 13] == 200 and padded[10, 1] == 0
    assert (squeezed == squeezed[:1]).all() and (squeezed[:, 6:9] == 250).all()
    digests = {str(identity_of(find(root, fit=f), "x").pixels) for f in ("crop", "pad", "squeeze")}
    assert len(digests) == 3
    said = find(root).describe()
    assert "4 of 4 are not square: --fit crop cuts away 75% of their area (at most 75%)" in said
    assert "--fit pad fills 75% of the square" in find(root, fit="pad").describe()


def test_another_fit_is_not_served_from_the_cache(tmp_path):
    root = tree(tmp_path, lambda f, n: colours(f, n, (10, 30)))
    first = pixels(root)
    assert not np.array_equal(pixels(root, fit="squeeze"), first)
    assert np.array_equal(pixels(root), first)


# places


def test_test_images_are_held_out_where_there_are_none(tmp_path):
    root = tree(tmp_path / "a", colours, splits="train", count=5)
    assert "pass --test_fraction 0.2" in refusal(lambda: find(root))
    source = find(root, test_fraction=0.4)
    assert source.labels["train"].bincount().tolist() == [3, 3]
    assert source.labels["test"].bincount().tolist() == [2, 2]
    both = source.pixels(["train", "test"])
    whole = find(root, pixels={}, test_fraction=0.1).pixels(["train", "test"])
    rows = [{row.numpy().tobytes() for row in torch.cat([*p.values()])} for p in (both, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 10
    alone = find(root, test_fraction=0.4, splits=("test",)).pixels(["test"])
    assert torch.equal(alone["test"], both["test"])
    parts = [identity_of(find(root, test_fraction=f), "x").parts["test"] for f in (0.4, 0.2)]
    assert parts[0] != parts[1]
    directly = tree(tmp_path / "b", colours, splits=".", count=5)
    assert len(find(directly, test_fraction=0.2).labels["test"]) == 2
    assert "pass --test_fraction" in refusal(lambda: find(directly))
    tested = tree(tmp_path / "c", colours)
    message = refusal(lambda: find(tested, test_fraction=0.2))
    assert "leave --test_fraction out, or give another --data_path" in message


def test_a_folder_val_beside_test_is_for_selection(tmp_path):
    root = tree(tmp_path, colours, splits="train test val")
    assert "val is not used in this call" in find(root).describe()
    source = find(root, splits=("train", "test", "val"))
    data = read_dataset(source, val=True)
    assert len(data.val.labels) == 4 and len(data.train.labels) == 4
    assert not torch.equal(data.val.images, data.test.images)
    held_out = find(root, splits=("train", "test", "val"), val_fraction=0.5)
    assert len(held_out.labels["val"]) == 2 and len(held_out.labels["train"]) == 2


LINES = "0.png,cat 1.png,dog 2.png,cat 3.png,dog".split()
TABLES = {  # by their place, what they hold
    "beside": {"train/labels.csv": ["file,label", *LINES], "test/labels.csv": ["f,label", *LINES]},
    "by split": {"train.csv": LINES, "test.csv": [line.replace(",", ";") for line in LINES]},
    "without endings": {
        f"{split}.csv": ["id,breed", *[line.replace(".png", "") for line in LINES]]
        for split in ("train", "test")
    },
    "one for all": {
        "labels.csv": [f"{split}/{line}" for split in ("train", "test") for line in LINES]
    },
    "many columns": {
        f"{split}.csv": ["x,class,image", *[f"9,{n},{f}" for f, n in (s.split(",") for s in LINES)]]
        for split in ("train", "test")
    },
}


def flat(root: Path, tables: dict[str, list[str]], splits="train test") -> Path:
    for split in splits.split():
        (root / split).mkdir(parents=True)
        for number in range(4):
            colours(root / split, number)
    for name, lines in tables.items():
        (root / name).write_text("\n".join(lines), "utf-8-sig")
    return root


@pytest.mark.parametrize("kind", TABLES)
def test_labels_in_a_csv(tmp_path, kind):
    source = find(flat(tmp_path, TABLES[kind]))
    assert source.class_names == ("cat", "dog")
    assert source.labels["train"].tolist() == source.labels["test"].tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(tmp_path / "train/2.png")).transpose(2, 0, 1)
    assert np.array_equal(pixels(tmp_path)[1], first)
    assert ".csv" in source.describe()
    assert ("columns id and breed" in source.describe()) == (kind == "without endings")


def test_a_csv_in_another_encoding_is_named_with_the_way_out(tmp_path):
    root = flat(tmp_path, {"train.csv": LINES, "test.csv": LINES})
    (root / "train.csv").write_text("\n".join(LINES), "utf-16")
    message = refusal(lambda: find(root))
    assert "train.csv: it is no text in UTF-8 (byte 0); save it as CSV in UTF-8" in message


def test_other_labels_are_other_images(tmp_path):
    root = flat(tmp_path, TABLES["by split"])
    before = identity_of(find(root), "x")
    (root / "train.csv").write_text("0.png,dog\n1.png,cat\n2.png,cat\n3.png,dog\n")
    assert identity_of(find(root), "x").parts["train"] != before.parts["train"]
    assert (
        len(
            find(flat(tmp_path / "b", {"train.csv": LINES}, "train"), test_fraction=0.5).labels[
                "test"
            ]
        )
        == 2
    )


def test_what_is_left_out_is_counted_by_ending(tmp_path):
    root = tree(tmp_path, colours)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/c.txt", "d.png"):
        (root / "train" / name).write_bytes(b"")
    (root / "train/dog/more").mkdir()
    said = find(root).describe()
    assert f"left out of {root}/train: 2 .heic, 1 .png, 1 .txt, 1 folders" in said
    assert "left out of {root}/test" not in said
    assert "2 classes (cat, dog), 4 train, 4 test images of 3x20x20" in said


# what cannot be


def at(number: int, save: Save, others: Save = grey) -> Save:
    return lambda folder, n: (save if n == number else others)(folder, n)


def holding(values: np.ndarray) -> Save:
    return lambda folder, number: np.save(folder / f"{number}.npy", values, allow_pickle=True)


def raw(content: bytes, name: str = "{}.npy") -> Save:
    return lambda folder, number: (folder / name.format(number)).write_bytes(content)


BAD = {
    "channels of different numbers": (at(1, array), "4 with 1 (", "4 with 4 ("),
    "floats among pictures": (
        at(1, lambda f, n: array(f, n, (SIDE, SIDE))),
        "1.npy have no stated range",
    ),
    "channels first": (holding(bits(3, SIDE, SIDE)), "0.npy", "channels come last"),
    "too many channels": (holding(bits(SIDE, SIDE, 17)), "0.npy", "C up to 16"),
    "too many bands": (
        lambda f, n: tifffile.imwrite(
            f / f"{n}.tif", bits(SIDE, SIDE, 17), photometric="minisblack", planarconfig="contig"
        ),
        "17 channels",
    ),
    "four axes": (holding(bits(2, SIDE, SIDE, 3)), "(H, W, C)"),
    "nothing inside": (holding(np.zeros((0, 4))), "(H, W, C)"),
    "no finite numbers": (holding(np.full((SIDE, SIDE), np.nan)), "no finite numbers"),
    "objects": (holding(np.array([[{}]], dtype=object)), "0.npy"),
    "complex numbers": (holding(np.ones((SIDE, SIDE), complex)), "no numbers"),
    "an empty file": (raw(b""), "0.npy"),
    "half a header": (raw(b"\x93NUMPY\x01\0v"), "0.npy"),
    "text": (raw(b"no array"), "0.npy"),
    "half a TIFF": (raw(b"II*\0\x08\0\0\0\x01\0", "{}.tif"), "0.tif"),
}


@pytest.mark.parametrize("what", BAD)
def test_files_that_cannot_be_used_are_named_before_any_work(tmp_path, what):
    save, *parts = BAD[what]
    message = refusal(lambda: find(tree(tmp_path, save)))
    assert all(part in message for part in parts), message


TROUBLE = {
    "one class": (lambda root: tree(root, grey, classes="cat"), "one class, cat: there is nothing"),
    "only other endings": (lambda root: tree(root, raw(b"", "{}.heic")), "it has 2 .heic"),
    "a file that is not there": (
        lambda root: flat(root, TABLES["by split"] | {"test.csv": ["7.png,cat"]}),
        "test.csv line 1: no image",
    ),
    "two labels": (
        lambda root: flat(root, TABLES["by split"] | {"test.csv": [*LINES, "0.png,dog"]}),
        "test.csv line 5: 0.png is dog here and cat before",
    ),
    "no label": (
        lambda root: flat(root, TABLES["by split"] | {"test.csv": ["0.png,"]}),
        "line 1: no label",
    ),
    "columns": (
        lambda root: flat(root, TABLES["by split"] | {"test.csv": ["a,b,c", "0.png,1,2"]}),
        "has the columns a, b, c",
    ),
    "one column": (
        lambda root: flat(root, TABLES["by split"] | {"test.csv": ["0.png"]}),
        "no two columns",
    ),
    "a name of two files": (
        lambda root: flat(root, {"labels.csv": LINES}),
        "write train/0.png",
    ),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_folders_that_cannot_be_used_are_named(tmp_path, what):
    make, part = TROUBLE[what]
    assert part in refusal(lambda: find(make(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--dataset folder --res 32x128", "--fit pad or --fit squeeze"),
        ("--dataset folder --fit stretch", "crop, pad, squeeze"),
        ("--dataset digits --fit pad", "--fit pad is for"),
        ("--dataset digits --test_fraction 0.1", "--test_fraction 0.1 is for"),
        ("--dataset folder --test_fraction 1", "--test_fraction"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, part):
    argv = [*flags.split(), "--data_path", str(tmp_path), "--buffer_path", str(tmp_path / "b")]
    with pytest.raises(UserError, match=part):
        buffer.main(argv)
    assert not (tmp_path / "b").exists()


# data sets by name


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    return header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_by_name(tmp_path, name):
    raw_files, images = tmp_path / name / "raw", bits(20, 28, 28)
    raw_files.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        (raw_files / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw_files / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = load_dataset(name, data_path=tmp_path)
    assert data.train.images.shape == (20, 1, 28, 28) and data.num_classes == 10
    assert data.test.labels.tolist() == labels.tolist()
    restored = data.normalisation.inverse(data.test.images)[:, 0] * 255
    assert np.array_equal(restored.round().numpy(), images)
    assert "--res 32 does not fit" in refusal(
        lambda: find_dataset(name, data_path=tmp_path, res=32)
    )
    (raw_files / "train-images-idx3-ubyte").write_bytes(b"no images")
    assert f"no complete {name}" in refusal(lambda: find_dataset(name, data_path=tmp_path))


def test_svhn_by_name(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "download", lambda self: None)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    images, labels = bits(32, 32, 3, 20), np.arange(1, 21)[:, None] % 10 + 1
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels})
    data = load_dataset("SVHN", data_path=tmp_path)
    restored = data.normalisation.inverse(data.train.images) * 255
    assert np.array_equal(restored.round().numpy(), images.transpose(3, 2, 0, 1))
    assert data.train.labels.tolist() == [label % 10 for label in labels[:, 0]]


# the three scripts


def test_bands_go_through_the_three_scripts(tmp_path, capsys):
    """Of four bands, with the best chosen on val/; the test images alone measure the set."""
    root = tree(tmp_path / "data", lambda f, n: array(f, n, (8, 8, 4)), "train test val", count=3)
    mine = ["--dataset", "folder", "--res", "8", "--model", "ConvNetD1", "--data_path", str(root)]
    mine += ["--buffer_path", str(tmp_path / "buffers")]
    buffer.main([*mine, "--num_experts", "1", "--train_epochs", "2"])
    assert "found folder: 2 classes (cat, dog), 6 train, 6 test images of 4x8x8" in (
        capsys.readouterr().out
    )
    where = ["--save_path", str(tmp_path / "results"), "--run_name", "run", "--lr_lr", "0"]
    few = ["--pix_init", "noise", "--ipc", "4", "--select", "val"]
    with pytest.raises(UserError, match=r"--ipc 4 is more than the 3 .* --pix_init noise"):
        distill_att.main([*SHORT, *mine, *where, *few[2:]])
    assert not (tmp_path / "results").exists()
    distill_att.main([*SHORT, *mine, *where, *few])
    said = capsys.readouterr().out
    assert "6 val images of 4x8x8" in said and "chosen on the images held out" in said
    path = tmp_path / "results/folder/ConvNetD1/ipc4/run/distilled_best.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["images"].shape == (8, 4, 8, 8) and len(saved["data"]["pixels"]["low"]) == 4
    (root / "train").rename(root / "away")
    evaluation.main(
        [
            "--distilled",
            str(path),
            "--num_eval",
            "1",
            "--epoch_eval_train",
            "1",
            "--data_path",
            str(root),
        ]
    )
    assert "6 test images of 4x8x8" in capsys.readouterr().out
