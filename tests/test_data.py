"""Every layout a data set may have on disk, the caches, and each bad input's one line."""

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
from utils.data.folders import image_files
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.normalisation import Normalisation, fit_zca

NETTE = IMAGENET_SUBSETS["imagenette"]


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


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, cat and dog, of two training and one test picture each."""
    for level, name in ((10, "cat"), (100, "dog")):
        picture(tmp_path / f"train/{name}/0.png", level)
        picture(tmp_path / f"train/{name}/1.png", level + 1)
        picture(tmp_path / f"test/{name}/0.png", level + 2)
    return tmp_path


# digits


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


@pytest.mark.parametrize("res", [16, 32])
def test_digits_are_resized(res):
    small, large = load_dataset("digits"), load_dataset("digits", res=res)
    assert large.test.images.shape == (360, 1, res, res)
    assert torch.equal(large.test.labels, small.test.labels)
    shrunk = torch.nn.functional.avg_pool2d(large.test.images, res // 8)
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.test.images.flatten()]))[0, 1] > 0.95


def test_digits_whitened():
    digits = load_dataset("digits", zca=True)
    assert digits.normalisation.zca and digits.normalisation.zca_matrix.shape == (64, 64)
    restored = digits.normalisation.inverse(digits.test.images)
    plain = load_dataset("digits")
    torch.testing.assert_close(
        restored, plain.normalisation.inverse(plain.test.images), atol=1e-5, rtol=0
    )


def test_to_moves_both_splits():
    digits = load_dataset("digits").to("meta")
    assert digits.train.images.is_meta and digits.test.labels.is_meta
    assert load_dataset("digits", test_only=True).to("meta").train is None


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
    half = Normalisation((0.5,) * 3, (0.5,) * 3)
    cifar = load_dataset("CIFAR10", data_path=tmp_path, normalisation=half, test_only=True)
    assert cifar.train is None and cifar.normalisation is half
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


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_missing_says_where_it_looked_and_how_to_get_it(tmp_path, name):
    with pytest.raises(UserError) as error:
        load_dataset(name, data_path=tmp_path / "nothing")
    message = one_line(error)
    assert str(tmp_path / "nothing") in message
    assert "no network in the tests" in message and f"{name[5:]}-python.tar.gz" in message


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


def test_cifar_tree_with_another_number_of_classes(folder):
    with pytest.raises(UserError, match="2 class folders instead of 10"):
        load_dataset("CIFAR10", data_path=folder)


def test_cifar_at_another_size(tmp_path):
    with pytest.raises(UserError, match="--res 64 does not fit CIFAR10"):
        load_dataset("CIFAR10", data_path=tmp_path, res=64)


# Tiny ImageNet

WNIDS = ("n01443537", "n01629819")


def tiny_train(root: Path) -> None:
    for label, wnid in enumerate(WNIDS):
        for number in range(2):
            path = root / f"train/{wnid}/images/{wnid}_{number}.JPEG"
            picture(path, 10 * label + number, size=(64, 64), mode="L" if number else "RGB")
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("0 0 1 1")


def tiny_official(root: Path) -> None:
    tiny_train(root)
    lines = []
    for number, wnid in enumerate((WNIDS[1], WNIDS[0], WNIDS[1])):
        picture(root / f"val/images/val_{number}.JPEG", 50 + number, size=(64, 64))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(root / "test/images/test_0.JPEG", 200, size=(64, 64))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text(f"n00001740\tentity\n{WNIDS[0]}\tgoldfish, Carassius auratus\n")


@pytest.mark.parametrize("place", [".", "tiny-imagenet-200"])
def test_tiny_as_unzipped(tmp_path, place):
    tiny_official(tmp_path / place)
    tiny = load_dataset("Tiny", data_path=tmp_path)
    assert tiny.train.images.shape == (4, 3, 64, 64)
    assert levels(tiny, "train") == [0, 1, 10, 11]
    assert tiny.train.labels.tolist() == [0, 0, 1, 1]
    assert levels(tiny) == [50, 51, 52]
    assert tiny.test.labels.tolist() == [1, 0, 1]
    assert tiny.class_names == ("goldfish", WNIDS[1])
    assert tiny.normalisation.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("inner", ["", "images/"])
def test_tiny_with_validation_images_sorted_into_folders(tmp_path, inner):
    tiny_train(tmp_path)
    for label, wnid in enumerate(WNIDS):
        picture(tmp_path / f"val/{wnid}/{inner}a.JPEG", 50 + label, size=(64, 64))
    (tmp_path / "val/val_annotations.txt").write_text("left over from the zip file")
    tiny = load_dataset("Tiny", data_path=tmp_path)
    assert levels(tiny) == [50, 51]
    assert tiny.test.labels.tolist() == [0, 1]
    assert tiny.class_names == WNIDS


@pytest.mark.parametrize("annotated", [True, False])
def test_tiny_without_its_training_images(tmp_path, annotated):
    if annotated:
        tiny_official(tmp_path)
        tmp_path.joinpath("train").rename(tmp_path / "away")
    else:
        for wnid in reversed(WNIDS):
            picture(tmp_path / f"val/{wnid}/a.JPEG", size=(64, 64))
    given = Normalisation((0.5,) * 3, (0.5,) * 3)
    tiny = load_dataset("Tiny", data_path=tmp_path, normalisation=given, test_only=True)
    assert tiny.test.labels.tolist() == ([1, 0, 1] if annotated else [0, 1])
    assert tiny.num_classes == 2 and tiny.train is None


@pytest.mark.parametrize("line", ["val_0.JPEG\tn99999999\t0", "val_0.JPEG"])
def test_tiny_with_a_bad_annotation(tmp_path, line):
    tiny_official(tmp_path)
    with (tmp_path / "val/val_annotations.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt line 4") as error:
        load_dataset("Tiny", data_path=tmp_path)
    one_line(error)


def test_tiny_with_a_class_that_is_never_annotated(tmp_path):
    tiny_official(tmp_path)
    (tmp_path / "val/val_annotations.txt").write_text(f"val_0.JPEG {WNIDS[0]}")
    with pytest.raises(UserError, match=f"lists no image of {WNIDS[1]}"):
        load_dataset("Tiny", data_path=tmp_path)


def test_tiny_without_classes(tmp_path):
    tiny_official(tmp_path)
    (tmp_path / "train").rename(tmp_path / "away")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        load_dataset("Tiny", data_path=tmp_path)


def test_an_annotated_picture_that_is_not_there_is_named(tmp_path):
    tiny_official(tmp_path)
    (tmp_path / "val/images/val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*val_1\.JPEG"):
        load_dataset("Tiny", data_path=tmp_path)


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


def test_imagenet_is_128_pixels_by_default(tmp_path):
    for wnid in NETTE:
        picture(tmp_path / f"train/{wnid}/a.JPEG")
        picture(tmp_path / f"val/{wnid}/a.JPEG")
    assert find_dataset("ImageNet", data_path=tmp_path, subset="imagenette").image_size == 128


def test_imagenet_lacks_a_folder(tmp_path):
    for wnid in NETTE:
        picture(tmp_path / f"train/{wnid}/a.JPEG")
        picture(tmp_path / f"val/{wnid}/a.JPEG")
    (tmp_path / f"val/{NETTE[3]}").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"no class folder .*val/{NETTE[3]}"):
        load_dataset("ImageNet", data_path=tmp_path, subset="imagenette")


@pytest.mark.parametrize("subset", [None, "imagecat"])
def test_imagenet_needs_a_known_subset(tmp_path, subset):
    with pytest.raises(UserError, match="choose one of imagenette, imagewoof") as error:
        load_dataset("ImageNet", data_path=tmp_path, subset=subset)
    assert str(subset) in one_line(error)


def test_the_subsets_are_ten_classes_each():
    assert len(IMAGENET_SUBSETS) == 6
    assert all(len(set(wnids)) == 10 for wnids in IMAGENET_SUBSETS.values())


def test_imagenet_is_too_large_for_zca_before_anything_is_decoded(tmp_path, monkeypatch):
    for wnid in NETTE:
        picture(tmp_path / f"train/{wnid}/a.JPEG")
        picture(tmp_path / f"val/{wnid}/a.JPEG")
    monkeypatch.setattr(decode, "_decode_one", None)
    with pytest.raises(UserError, match=r"9\.7 GB"):
        load_dataset("ImageNet", data_path=tmp_path, subset="imagenette", zca=True)


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


def test_classes_that_differ_are_named(folder):
    picture(folder / "test/bird/0.png")
    with pytest.raises(UserError, match=r"must have the same classes; .* has bird"):
        load_dataset("folder", data_path=folder)


def test_an_empty_class_is_named(folder):
    for file in (folder / "train/dog").iterdir():
        file.unlink()
    (folder / "train/dog/notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"no images in the class folder .*train/dog"):
        load_dataset("folder", data_path=folder)


def test_a_tree_without_class_folders(tmp_path):
    picture(tmp_path / "train/0.png")
    picture(tmp_path / "test/0.png")
    with pytest.raises(UserError, match=r"no class folders in .*train"):
        load_dataset("folder", data_path=tmp_path)


# caches


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """The names of the files decoded so far."""
    calls: list[str] = []
    decode_one = decode._decode_one

    def record(file: Path, res: int) -> np.ndarray:
        calls.append(file.parent.name + "/" + file.name)
        return decode_one(file, res)

    monkeypatch.setattr(decode, "_decode_one", record)
    return calls


def test_the_second_read_decodes_nothing(folder, decodes):
    first = load_dataset("folder", data_path=folder)
    assert len(decodes) == 6
    second = load_dataset("folder", data_path=folder)
    assert len(decodes) == 6
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)


def test_a_relative_path_finds_the_same_cache(folder, decodes, monkeypatch):
    load_dataset("folder", data_path=folder)
    monkeypatch.chdir(folder.parent)
    load_dataset("folder", data_path=folder.name)
    assert len(decodes) == 6


def test_the_key_of_a_cache_depends_on_the_size(folder):
    files = image_files(folder / "train/cat")
    assert decode.fingerprint(files, 8) != decode.fingerprint(files, 16)


@pytest.mark.parametrize("change", ["a new file", "another size", "another time", "another res"])
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
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0]
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


# choices


def test_an_unknown_dataset_lists_the_known():
    with pytest.raises(UserError) as error:
        load_dataset("MNIST")
    assert "MNIST" in one_line(error) and all(name in str(error.value) for name in DATASETS)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"ImageNet"}))
def test_a_subset_goes_with_imagenet_only(name):
    with pytest.raises(UserError, match=f"--subset imagenette .* not with {name}"):
        load_dataset(name, subset="imagenette")


@pytest.mark.parametrize("res", [7, 0, -1])
def test_too_small_a_size(res):
    with pytest.raises(UserError, match=f"--res {res} is too small: give 8 or more"):
        load_dataset("digits", res=res)


@pytest.mark.parametrize("name", ["Tiny", "ImageNet", "folder"])
def test_missing_data_say_where_they_were_looked_for(tmp_path, name):
    subset = "imagenette" if name == "ImageNet" else None
    with pytest.raises(UserError, match="looked for the folders train and") as error:
        load_dataset(name, data_path=tmp_path / "nothing", subset=subset)
    assert str(tmp_path / "nothing") in one_line(error) and "--data_path" in str(error.value)


def test_metadata_are_known_without_decoding(folder, decodes):
    source = find_dataset("folder", data_path=folder, res=24)
    assert (source.class_names, source.channels, source.image_size) == (("cat", "dog"), 3, 24)
    assert decodes == []
