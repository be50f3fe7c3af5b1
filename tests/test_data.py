"""Every layout a data set may have on disk, the caches, and each bad input's one line."""

import logging
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.data import decode
from utils.data.dataset import DATASETS, ImageDataset, find_dataset, load_dataset
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.normalisation import Normalisation, fit_zca

NETTE = IMAGENET_SUBSETS["imagenette"]
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in the tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def picture(path: Path, level: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """A picture of one grey level; the format follows the name, JPEG keeps grey exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path)


def levels(dataset: ImageDataset, split: str = "test") -> list[int]:
    """The grey level, 0 to 255, of each image, all of whose pixels must be the same."""
    images = dataset.normalisation.inverse(getattr(dataset, split).images) * 255
    flat = images.round().flatten(1)
    assert torch.equal(flat.min(1).values, flat.max(1).values)
    return flat[:, 0].int().tolist()


def pictures(root: Path, files: dict[str, int], size: tuple[int, int] = (8, 8)) -> None:
    for file, level in files.items():
        picture(root / file, level, size)


def two_classes(root: Path) -> Path:
    """Cat and dog, of two training and one test picture each."""
    cats = {"train/cat/0.png": 10, "train/cat/1.png": 11, "test/cat/0.png": 12}
    dogs = {file.replace("cat", "dog"): level + 90 for file, level in cats.items()}
    pictures(root, cats | dogs)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """The names of the files decoded so far."""
    calls: list[str] = []
    decode_one = decode._decode_one

    def record(file: Path, decoding: decode.Decoding) -> np.ndarray:
        calls.append(file.parent.name + "/" + file.name)
        return decode_one(file, decoding)

    monkeypatch.setattr(decode, "_decode_one", record)
    return calls


WNIDS = ("n01443537", "n01629819")


def tiny(root: Path) -> Path:
    """Tiny ImageNet of two classes, as unzipped."""
    train = [f"train/{wnid}/images/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(2)]
    pictures(root, dict(zip(train, (0, 1, 10, 11), strict=True)), (64, 64))
    picture(root / train[1], 1, (64, 64), "L")
    lines = []
    for number, wnid in enumerate((WNIDS[1], WNIDS[0], WNIDS[1])):
        picture(root / f"val/images/val_{number}.JPEG", 50 + number, (64, 64))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / f"train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt").write_text("0 0 1 1")
    picture(root / "test/images/test_0.JPEG", 200, (64, 64))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text(f"n00001740\tentity\n{WNIDS[0]}\tgoldfish, Carassius auratus\n")
    return root


def imagenette(root: Path) -> Path:
    pictures(root, {f"{split}/{wnid}/a.JPEG": 0 for split in ("train", "val") for wnid in NETTE})
    return root


# digits


@pytest.mark.parametrize("res", [16, 32])
def test_digits_are_resized(res):
    small, large = load_dataset("digits"), load_dataset("digits", res=res)
    assert large.test.images.shape == (360, 1, res, res)
    assert torch.equal(large.test.labels, small.test.labels)
    shrunk = torch.nn.functional.avg_pool2d(large.test.images, res // 8)
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.test.images.flatten()]))[0, 1] > 0.95


def test_digits_whitened():
    whitened, plain = load_dataset("digits", zca=True), load_dataset("digits", test_only=True)
    assert whitened.normalisation.zca and whitened.normalisation.zca_matrix.shape == (64, 64)
    restored, images = (d.normalisation.inverse(d.test.images) for d in (whitened, plain))
    torch.testing.assert_close(restored, images, atol=1e-5, rtol=0)
    assert plain.to("meta").train is None
    assert whitened.to("meta").train.images.is_meta and whitened.to("meta").test.labels.is_meta


def test_digits_are_split_by_class_and_standardised():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.dtype == torch.float32 and digits.train.labels.dtype == torch.int64
    assert (digits.channels, digits.image_size, digits.num_classes) == (1, 8, 10)
    assert digits.class_names == tuple("0123456789")
    shares = digits.test.labels.bincount() / (
        digits.test.labels.bincount() + digits.train.labels.bincount()
    )
    assert (shares - 0.2).abs().max() < 0.01
    assert digits.train.images.mean().abs() < 1e-5
    assert digits.train.images.std() == pytest.approx(1, abs=1e-4)


def test_digits_are_the_scans_whatever_the_seed():
    from sklearn.datasets import load_digits

    torch.manual_seed(1)
    first = load_dataset("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second = load_dataset("digits")
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)

    def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(bytes([label, *scan]) for scan, label in zip(images, labels, strict=True))

    units = [first.normalisation.inverse(s.images) * 16 for s in (first.train, first.test)]
    scans = torch.cat(units).round().byte().flatten(1).numpy()
    labels = torch.cat([first.train.labels, first.test.labels]).numpy()
    bundled = load_digits()
    assert rows(scans, labels) == rows(bundled.data.astype(np.uint8), bundled.target)


# CIFAR


def test_cifar10_as_torchvisions_files(cifar10_path):
    cifar = load_dataset("CIFAR10", data_path=cifar10_path)
    assert cifar.train.images.shape == (50000, 3, 32, 32)
    assert cifar.test.images.shape == (10000, 3, 32, 32)
    assert cifar.test.labels.bincount().tolist() == [1000] * 10
    assert cifar.class_names[:3] == ("airplane", "automobile", "bird")
    assert cifar.train.images.mean().abs() < 0.01
    batch = pickle.loads(
        (cifar10_path / "cifar-10-batches-py/test_batch").read_bytes(), encoding="latin1"
    )
    pixels = cifar.normalisation.inverse(cifar.test.images[:100]) * 255
    assert torch.equal(pixels.round().byte().flatten(1), torch.from_numpy(batch["data"][:100]))
    assert cifar.test.labels.tolist() == batch["labels"]


def test_cifar10_test_images_alone_suffice_for_a_given_normalisation(cifar10_path, tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("test_batch", "batches.meta"):
        (batches / name).symlink_to(cifar10_path / batches.name / name)
    cifar = load_dataset("CIFAR10", data_path=tmp_path, normalisation=HALF, test_only=True)
    assert cifar.train is None and cifar.normalisation is HALF
    assert (cifar.test.images.min(), cifar.test.images.max()) == (-1, 1)
    with pytest.raises(UserError, match="no complete CIFAR10"):
        load_dataset("CIFAR10", data_path=tmp_path)


def test_a_damaged_cifar_file_is_not_taken_for_whole(cifar10_path, tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for file in (cifar10_path / batches.name).iterdir():
        (batches / file.name).symlink_to(file)
    (batches / "data_batch_3").unlink()
    (batches / "data_batch_3").write_bytes(
        (cifar10_path / batches.name / "data_batch_3").read_bytes()[:-1]
    )
    with pytest.raises(UserError, match="no complete CIFAR10"):
        load_dataset("CIFAR10", data_path=tmp_path)


@pytest.mark.parametrize("place", [".", "CIFAR100"])
def test_cifar100_as_a_class_folder_tree_in_numerical_order(tmp_path, place):
    for label in range(100):
        picture(tmp_path / place / f"train/{label}/a.png", label, size=(32, 32))
        picture(tmp_path / place / f"test/{label}/a.png", 100 + label, size=(32, 32))
    cifar = load_dataset("CIFAR100", data_path=tmp_path)
    assert cifar.class_names == tuple(map(str, range(100)))
    assert levels(cifar, "train") == list(range(100))
    assert levels(cifar) == list(range(100, 200))
    assert cifar.test.labels.tolist() == list(range(100))
    assert cifar.normalisation.mean == (0.4914, 0.4822, 0.4465)


# Tiny ImageNet


@pytest.mark.parametrize("place", [".", "tiny-imagenet-200"])
def test_tiny_as_unzipped(tmp_path, place):
    tiny(tmp_path / place)
    data = load_dataset("Tiny", data_path=tmp_path)
    assert data.train.images.shape == (4, 3, 64, 64)
    assert levels(data, "train") == [0, 1, 10, 11]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert levels(data) == [50, 51, 52]
    assert data.test.labels.tolist() == [1, 0, 1]
    assert data.class_names == ("goldfish", WNIDS[1])
    assert data.normalisation.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("inner", ["", "images/"])
def test_tiny_with_validation_images_sorted_into_folders(tmp_path, inner):
    tiny(tmp_path)
    (tmp_path / "val/images").rename(tmp_path / "away")
    (tmp_path / "words.txt").unlink()
    pictures(tmp_path, {f"val/{WNIDS[n]}/{inner}a.JPEG": 50 + n for n in range(2)}, (64, 64))
    data = load_dataset("Tiny", data_path=tmp_path)
    assert levels(data) == [50, 51]
    assert data.test.labels.tolist() == [0, 1]
    assert data.class_names == WNIDS


@pytest.mark.parametrize("annotated", [True, False])
def test_tiny_without_its_training_images(tmp_path, annotated):
    if annotated:
        tiny(tmp_path)
        tmp_path.joinpath("train").rename(tmp_path / "away")
    else:
        pictures(tmp_path, {f"val/{wnid}/a.JPEG": 0 for wnid in reversed(WNIDS)}, (64, 64))
    data = load_dataset("Tiny", data_path=tmp_path, normalisation=HALF, test_only=True)
    assert data.test.labels.tolist() == ([1, 0, 1] if annotated else [0, 1])
    assert data.num_classes == 2 and data.train is None


# ImageNet


@pytest.mark.parametrize("extra", [(), ("n00000001", "n09999999")], ids=["ten folders", "full"])
def test_imagenet_takes_the_subsets_folders_in_its_order(tmp_path, extra):
    wnids = IMAGENET_SUBSETS["imageyellow"]
    for level, wnid in enumerate([*wnids, *extra]):
        picture(tmp_path / f"train/{wnid}/{wnid}_1.JPEG", level, size=(20, 30))
        picture(tmp_path / f"val/{wnid}/ILSVRC2012_val_1.JPEG", 100 + level, size=(30, 20))
    imagenet = load_dataset("ImageNet", data_path=tmp_path, subset="imageyellow", res=16)
    assert imagenet.train.images.shape == (10, 3, 16, 16)
    assert levels(imagenet, "train") == list(range(10))
    assert levels(imagenet) == list(range(100, 110))
    assert imagenet.test.labels.tolist() == list(range(10))
    assert imagenet.class_names == wnids


def test_a_size_and_classes_are_known_before_anything_is_decoded(tmp_path, decodes):
    imagenet = find_dataset("ImageNet", data_path=imagenette(tmp_path), subset="imagenette")
    assert (imagenet.class_names, imagenet.channels, imagenet.image_size) == (NETTE, 3, 128)
    with pytest.raises(UserError, match=r"9\.7 GB"):
        load_dataset("ImageNet", data_path=tmp_path, subset="imagenette", zca=True)
    assert decodes == []


# the user's own pictures


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder(folder, test_name):
    (folder / "test").rename(folder / test_name)
    mine = load_dataset("folder", data_path=folder)
    assert mine.train.images.shape == (4, 3, 32, 32)
    assert mine.class_names == ("cat", "dog")
    assert levels(mine, "train") == [10, 11, 100, 101]
    assert levels(mine) == [12, 102]
    assert mine.test.labels.tolist() == [0, 1]
    assert mine.normalisation.mean == pytest.approx([(10 + 11 + 100 + 101) / 4 / 255] * 3)
    assert load_dataset("folder", data_path=folder, res=8).image_size == 8


def test_only_the_test_folder_is_needed_for_a_given_normalisation(folder):
    given = load_dataset("folder", data_path=folder).normalisation
    (folder / "train").rename(folder / "away")
    mine = load_dataset("folder", data_path=folder, normalisation=given, test_only=True)
    assert mine.train is None and levels(mine) == [12, 102]


def test_a_left_out_whitening_is_fitted_again_on_the_training_images(folder):
    fitted = load_dataset("folder", data_path=folder, res=8, zca=True)
    stored = Normalisation.from_dict(fitted.normalisation.to_dict(include_whitening=False))
    again = load_dataset("folder", data_path=folder, res=8, normalisation=stored, test_only=True)
    assert again.train is None
    assert torch.equal(again.test.images, fitted.test.images)


def test_a_normalisation_of_other_images_is_refused(folder):
    grey = load_dataset("digits").normalisation
    with pytest.raises(UserError, match="3x32x32, but the given normalisation is for 1 channels"):
        load_dataset("folder", data_path=folder, normalisation=grey, test_only=True)
    small = load_dataset("folder", data_path=folder, res=8, zca=True).normalisation
    with pytest.raises(UserError, match="192 values an image"):
        load_dataset("folder", data_path=folder, normalisation=small, test_only=True)


# caches


def test_the_second_read_decodes_nothing(folder, decodes, monkeypatch):
    first = load_dataset("folder", data_path=folder)
    assert len(decodes) == 6
    monkeypatch.chdir(folder.parent)
    second = load_dataset("folder", data_path=folder.name)
    assert len(decodes) == 6
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)


@pytest.mark.parametrize(
    "change", ["a new file", "another size", "another time", "another content", "another res"]
)
def test_a_change_is_noticed(folder, decodes, change):
    load_dataset("folder", data_path=folder)
    path, res = folder / "train/cat/0.png", None
    match change:
        case "a new file":
            picture(folder / "train/cat/2.png", 77)
        case "another size":
            picture(path, 77, size=(9, 9))
        case "another time":
            os.utime(path, ns=(0, 0))
        case "another content":  # of the same size and time, as archives restore it
            before = path.stat()
            picture(path, 13)
            assert path.stat().st_size == before.st_size
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "another res":
            res = 16
    decodes.clear()
    load_dataset("folder", data_path=folder, res=res)
    assert "cat/0.png" in decodes


def test_a_damaged_cache_is_rebuilt(folder, decodes):
    first = load_dataset("folder", data_path=folder)
    cache = folder / ".cache/folder_32_train.pt"
    cache.write_bytes(cache.read_bytes()[:-100])
    decodes.clear()
    again = load_dataset("folder", data_path=folder)
    assert len(decodes) == 4
    assert torch.equal(first.train.images, again.train.images)
    load_dataset("folder", data_path=folder)
    assert len(decodes) == 4


def test_without_a_writable_folder_it_goes_on_with_one_warning_each(folder, caplog):
    (folder / ".cache").write_text("in the way")
    mine = load_dataset("folder", data_path=folder)
    assert levels(mine) == [12, 102]
    said = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [record.getMessage().count("\n") for record in said] == [0, 0]
    assert "going on without a cache" in caplog.text


def test_zca_is_fitted_once_for_the_same_images(folder, monkeypatch):
    first = load_dataset("folder", data_path=folder, res=8, zca=True)
    monkeypatch.setattr("utils.data.dataset.fit_zca", None)
    second = load_dataset("folder", data_path=folder, res=8, zca=True)
    assert torch.equal(first.train.images, second.train.images)
    picture(folder / "train/cat/0.png", 99)
    with pytest.raises(TypeError):
        load_dataset("folder", data_path=folder, res=8, zca=True)


# images held out


def test_of_two_pictures_a_class_keeps_one(folder):
    mine = load_dataset("folder", data_path=folder, val_fraction=0.9)
    train, val = levels(mine, "train"), levels(mine, "val")
    assert sorted(train + val) == [10, 11, 100, 101]
    assert mine.train.labels.tolist() == mine.val.labels.tolist() == [0, 1]
    assert mine.normalisation.mean == pytest.approx([sum(train) / 2 / 255] * 3)
    again = load_dataset("folder", data_path=folder, val_fraction=0.9)
    assert levels(again, "val") == val


def test_a_class_too_small_to_divide_is_named(folder):
    (folder / "train/dog/0.png").unlink()
    with pytest.raises(UserError, match=r"--val_fraction 0\.5: class dog has 1 training images"):
        find_dataset("folder", data_path=folder, val_fraction=0.5)


def test_zca_is_fitted_and_kept_without_the_images_held_out(folder, monkeypatch):
    whole = load_dataset("folder", data_path=folder, res=8, zca=True)
    rest = load_dataset("folder", data_path=folder, res=8, zca=True, val_fraction=0.5)
    source = find_dataset("folder", data_path=folder, res=8, val_fraction=0.5)
    pixels = source.pixels(["train"])["train"]
    assert torch.equal(rest.normalisation.zca_matrix, fit_zca(pixels / 255).zca_matrix)
    assert not torch.equal(rest.normalisation.zca_matrix, whole.normalisation.zca_matrix)
    monkeypatch.setattr("utils.data.dataset.fit_zca", None)  # both are kept
    for fraction, first in ((0.0, whole), (0.5, rest)):
        again = load_dataset("folder", data_path=folder, res=8, zca=True, val_fraction=fraction)
        assert torch.equal(again.train.images, first.train.images)


# what is refused


def annotate(root: Path, *lines: str) -> None:
    (root / "val/val_annotations.txt").write_text("\n".join(lines))


def empty(folder: Path) -> None:
    """Hide what is in it, and leave what is no picture."""
    folder.rename(folder.with_name(".away"))
    folder.mkdir()
    (folder / "notes.txt").touch()


MAKE = {"CIFAR10": two_classes, "Tiny": tiny, "ImageNet": imagenette, "folder": two_classes}
GOOD = f"val_0.JPEG {WNIDS[0]}"
SPOILT = [  # a whole tree, what is done to it, what is said
    ("CIFAR10", lambda root: None, "2 class folders instead of 10"),
    ("Tiny", lambda root: annotate(root, GOOD, "val_1.JPEG\tn99999999"), r"tions\.txt line 2"),
    ("Tiny", lambda root: annotate(root, GOOD, "val_1.JPEG"), r"val_annotations\.txt line 2"),
    ("Tiny", lambda root: annotate(root, GOOD), f"lists no image of {WNIDS[1]}"),
    ("Tiny", lambda root: (root / "val/images/val_1.JPEG").unlink(), r"the image .*val_1\.JPEG"),
    ("Tiny", lambda root: empty(root / "train"), "no class folders"),
    (
        "ImageNet",
        lambda root: (root / "val" / NETTE[3]).rename(root / "x"),
        "no class folder .*val/",
    ),
    ("folder", lambda root: picture(root / "test/bird/0.png"), "the same classes; .* has bird"),
    ("folder", lambda root: empty(root / "train/dog"), "no images in the class folder .*train/dog"),
    ("folder", lambda root: empty(root / "train"), "no class folders in .*train"),
]


@pytest.mark.parametrize(("dataset", "spoil", "message"), SPOILT)
def test_a_tree_that_is_not_as_it_should_be_is_refused(tmp_path, dataset, spoil, message):
    spoil(MAKE[dataset](tmp_path))
    subset = "imagenette" if dataset == "ImageNet" else None
    with pytest.raises(UserError, match=message) as error:
        load_dataset(dataset, data_path=tmp_path, subset=subset)
    assert "\n" not in str(error.value)


PATH = "nothing"
LOOKED = ["looked for the folders train and", "--data_path"]


@pytest.mark.parametrize(
    ("dataset", "options", "parts"),
    [
        ("EMNIST", {}, ["EMNIST", *DATASETS]),
        ("CIFAR10", {"res": 64}, ["--res 64 does not fit CIFAR10"]),
        *[("digits", {"res": res}, [f"--res {res} is too small: give 8"]) for res in (7, 0, -1)],
        *[("ImageNet", {"subset": s}, [f"{s}: choose one of imagenette, i"]) for s in (None, "x")],
        *[
            (name, {"subset": "imagenette"}, ["--subset imagenette goes with", f"not with {name}"])
            for name in DATASETS
            if name != "ImageNet"
        ],
        ("CIFAR10", {}, [PATH, "no network in the tests", "10-python.tar.gz"]),
        ("CIFAR100", {}, [PATH, "no network in the tests", "100-python.tar.gz"]),
        ("Tiny", {}, [PATH, *LOOKED]),
        ("ImageNet", {"subset": "imagenette"}, [PATH, *LOOKED]),
        ("folder", {}, [PATH, *LOOKED]),
    ],
)
def test_choices_and_folders_that_are_not_there_are_named_in_one_line(
    tmp_path, dataset, options, parts
):
    path = tmp_path / PATH
    with pytest.raises(UserError) as error:
        load_dataset(dataset, data_path=path, **options)
    assert "\n" not in str(error.value)
    assert all(part.replace(PATH, str(path)) in str(error.value) for part in parts)
