"""Distilled sets of other codes: every format is read, what no file says is asked for by name."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from short_runs import digits_set, run
from torch import Tensor, nn
from torch.nn import functional as F

import eval as evaluation
from scripts import convert
from scripts.faults.damage import trapped
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import load_dataset
from utils.data.distilled import SyntheticSet
from utils.data.foreign.content import Content, Stated
from utils.data.foreign.decide import open_set, provenance, usual_network
from utils.data.foreign.formations import decoded
from utils.data.foreign.space import OF_DC, brought
from utils.data.normalisation import Normalisation
from utils.data.real_images import random_real_images
from utils.data.source import Source
from utils.data.sources import CIFAR_NORMALISATION

DIGITS = Stated(dataset="digits", space="normalised")
ORDER = torch.arange(10).repeat_interleave(2)
EVAL = "--model MLP --epoch_eval_train 3 --num_eval 2 --precision fp64".split()


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def images(data) -> Tensor:
    """Two real digits a class, normalised."""
    return random_real_images(data, 2, stream(0, "test"))


def save(value, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def said_of(distilled: SyntheticSet) -> str:
    return "\n".join(provenance(distilled))


def refusal(path: Path, stated: Stated = DIGITS) -> str:
    with pytest.raises(UserError) as caught:
        open_set(path, stated)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# tensors in files of their own: MTT and its successors


@pytest.mark.parametrize(
    ("name", "labels", "rate", "iteration", "kind"),
    [
        ("images_best.pt", "labels_best.pt", "lr_best.pt", 0, "raw"),
        ("images_500.pt", "labels_500.pt", "lr_500.pt", 500, "raw"),
        ("ema_images_best.pt", "ema_labels_best.pt", "ema_lr_best.pt", 0, "ema"),
        ("images_best_ema.pt", "labels_best_ema.pt", "lr_best_ema.pt", 0, "ema"),
        ("images_ipc-2_best.pt", "labels_ipc-2_best.pt", "lr_ipc-2_best.pt", 0, "raw"),
    ],
)
def test_images_labels_and_rate_lie_beside_each_other(
    images, tmp_path, name, labels, rate, iteration, kind
):
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    path = save(nn.Parameter(images[shuffled].double()), tmp_path / name)
    save(ORDER[shuffled], tmp_path / labels)
    save(torch.tensor(0.03), tmp_path / rate)
    distilled = open_set(path, DIGITS)
    assert sorted(map(str, distilled.images)) == sorted(map(str, images))
    assert torch.equal(distilled.labels, ORDER)
    assert distilled.syn_lr == pytest.approx(0.03)
    assert (distilled.iteration, distilled.set, distilled.ipc) == (iteration, kind, 2)
    assert distilled.label_form is None
    assert "put in the order of their classes" in said_of(distilled)
    assert f"read too: {labels}" in said_of(distilled)


def test_without_labels_and_rate_they_are_by_order_and_the_fields(images, tmp_path):
    distilled = open_set(save(images, tmp_path / "images_best.pt"), DIGITS)
    assert torch.equal(distilled.images, images) and torch.equal(distilled.labels, ORDER)
    assert "classes: by order, 2 images of each class" in said_of(distilled)
    assert distilled.syn_lr == 0.01
    assert "rate: 0.01, as the field trains on images without a learned rate" in said_of(distilled)
    assert (
        open_set(tmp_path / "images_best.pt", Stated("digits", space="zca", lr=0.5)).syn_lr == 0.5
    )


LOGITS = 3 * torch.randn(20, 10, generator=torch.Generator().manual_seed(1)) + 9 * F.one_hot(ORDER)


@pytest.mark.parametrize(
    ("labels", "form", "why"),
    [
        (LOGITS, "logits", "logits, since rows sum to"),
        (LOGITS.softmax(1), "probabilities", "probabilities, since rows sum to 1"),
        (F.one_hot(ORDER).float(), None, "classes, written as 0 and 1"),
        (ORDER.float()[:, None], None, ""),
        (ORDER.int(), None, ""),
    ],
)
def test_what_labels_are_is_proved_by_their_values(images, tmp_path, labels, form, why):
    path = save(images, tmp_path / "images_best.pt")
    save(labels, tmp_path / "labels_best.pt")
    distilled = open_set(path, DIGITS)
    assert distilled.label_form == form
    assert torch.equal(distilled.labels, ORDER)
    assert why in said_of(distilled)
    if form:
        assert torch.equal(distilled.soft_labels, labels)
        assert re.search(r"classes: by order, the likeliest .* for \d+ of 20", said_of(distilled))


def test_soft_labels_in_another_order_say_the_classes(images, tmp_path):
    path = save(images.flip(0), tmp_path / "images_best.pt")
    save(9.0 * F.one_hot(ORDER).flip(0), tmp_path / "labels_best.pt")
    distilled = open_set(path, DIGITS)
    assert torch.equal(distilled.soft_labels.argmax(1), ORDER)
    assert "the likeliest of the soft labels; only 0 of 20 are by order" in said_of(distilled)


@pytest.mark.parametrize(
    ("labels", "stated", "words"),
    [
        (LOGITS - LOGITS.mean(1, keepdim=True), {}, "sum to 0, .*: --labels_are logits takes"),
        (LOGITS, {"labels_are": "probabilities"}, "--labels_are probabilities: .* rows that sum"),
        (LOGITS[:, :9], {}, "labels are of 9 classes, the data set has 10: --dataset"),
        (LOGITS[:9], {}, r"shape \[9, 10\], which does not fit 20 images"),
        (ORDER + 1, {}, "labels 1 to 10 are not of 10 classes: --dataset"),
        (ORDER * (ORDER != 3), {}, "class 1 has|class 3 has 0 images, class 0 4"),
        (ORDER + 0.5, {}, r"its labels \[0.5, 0.5, 1.5\] ... are no classes"),
        ([1, 2], {}, "labels are a list, no plain tensor"),
        (LOGITS * float("nan"), {}, "no finite numbers"),
        (torch.zeros(1).expand(20, 10), {}, "have no values"),
    ],
)
def test_labels_that_do_not_fit_are_refused(images, tmp_path, labels, stated, words):
    path = save(images, tmp_path / "images_best.pt")
    save(labels, tmp_path / "labels_best.pt")
    assert re.search(words, refusal(path, Stated("digits", space="normalised", **stated)))


def test_mtts_pictures_are_no_data_unless_that_is_said(images, tmp_path):
    path = save(images.sigmoid(), tmp_path / "images_zca_100.pt")
    assert "give images_100.pt, or --space unit" in refusal(path, Stated("digits"))
    assert not open_set(path, Stated("digits", space="unit")).normalisation.zca
    whitened = save(images, tmp_path / "digits_zca_ipc2.pt")
    distilled = open_set(whitened, Stated("digits"))
    assert distilled.normalisation.needs_fit
    assert "images: zca, as the file's name says" in said_of(distilled)


def test_parts_are_joined_only_where_that_is_said(images, tmp_path):
    for k in range(10):
        save(images[2 * k : 2 * k + 2], tmp_path / f"by_class/images_{k + 1}.pt")
    words = refusal(tmp_path / "by_class")
    assert "--parts classes" in words and "images_1.pt, images_10.pt" in words
    stated = Stated("digits", space="normalised", parts="classes")
    joined = open_set(tmp_path / "by_class", stated)
    assert torch.equal(joined.images, images)
    assert "10 parts: images_1.pt ... images_10.pt" in said_of(joined)
    for k in (0, 1):
        save(images[k::2], tmp_path / f"by_image/images_{k}.pt")
    by_image = Stated("digits", space="normalised", parts="images")
    joined = open_set(tmp_path / "by_image", by_image)
    assert torch.equal(joined.images, images)
    save(images[:3], tmp_path / "by_image/images_2.pt")
    assert "3 images without labels cannot be class by class" in refusal(
        tmp_path / "by_image", by_image
    )


def test_a_folder_with_one_set_is_that_set(images, tmp_path):
    save(images, tmp_path / "images_best.pt")
    save(ORDER.flip(0), tmp_path / "labels_best.pt")
    assert torch.equal(open_set(tmp_path, DIGITS).images[0], images[18])


# one file: DC, IDC, npz, safetensors


def test_an_experiment_of_many_is_named(images, tmp_path, capsys):
    accuracies = {"ConvNet": [np.float64(0.3), np.mean([0.1, 0.2])]}
    pairs = [[images, ORDER], [images + 1, ORDER]]
    path = save({"data": pairs, "accs_all_exps": accuracies}, tmp_path / "res_DM_x_2ipc.pt")
    assert torch.equal(open_set(path, DIGITS).images, images)
    assert "experiment 0 of 2; --experiment chooses another" in capsys.readouterr().out
    second = Stated("digits", space="normalised", experiment=1)
    assert torch.equal(open_set(path, second).images, images + 1)
    third = Stated("digits", space="normalised", experiment=2)
    assert "holds 2, so 0 ... 1" in refusal(path, third)


@pytest.mark.parametrize("pairs", [[], 3, [[1]], [[1, 2, 3]], {}, [["a", "b"]]])
def test_odd_experiments_are_refused(tmp_path, pairs):
    assert "res.pt" in refusal(save({"data": pairs}, tmp_path / "res.pt"))


def test_several_images_in_one_are_cut_and_enlarged(images, tmp_path):
    packed = images.sigmoid()
    path = save((packed, ORDER), tmp_path / "data_100.pt")
    assert "--factor 2 where four, --factor 1" in refusal(path, Stated("digits"))
    distilled = open_set(path, Stated("digits", factor=2))
    assert (len(distilled.images), distilled.ipc, distilled.iteration) == (80, 8, 100)
    top_right = F.interpolate(packed[:1, :, :4, 4:], size=8, mode="bilinear")
    seen = distilled.normalisation.inverse(distilled.images)
    torch.testing.assert_close(seen[1:2], top_right, atol=1e-5, rtol=0)
    assert torch.equal(distilled.labels, torch.arange(10).repeat_interleave(8))
    assert len(open_set(path, Stated("digits", factor=1)).images) == 20
    assert "--factor 3: images of 8 pixels" in refusal(path, Stated("digits", factor=3))


def test_decoding_keeps_what_is_alike_everywhere():
    packed = torch.arange(4.0).view(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    parts = decoded(packed.double(), 2, Path("x"))
    expected = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).double()
    assert torch.equal(parts, expected)


def test_arrays_of_numpy(images, tmp_path):
    path = tmp_path / "digits.npz"
    last = images.permute(0, 2, 3, 1).numpy().astype(">f4")
    np.savez(path, images=last, labels=ORDER.numpy(), syn_lr=0.02)
    distilled = open_set(path, DIGITS)
    assert torch.equal(distilled.images, images) and distilled.syn_lr == 0.02
    pixels = (255 * images.sigmoid()).byte()
    for values in (pixels.numpy(), pixels.double().numpy()):
        np.savez(path, x=values, y=ORDER.numpy())
        distilled = open_set(path, Stated("digits"))
        torch.testing.assert_close(
            distilled.normalisation.inverse(distilled.images), pixels / 255, atol=1e-6, rtol=0
        )
        assert "images: unit, since they are bytes" in said_of(distilled)
        assert "--space zca: the images of" in refusal(path, Stated("digits", space="zca"))
    np.savez(path, pictures=last)
    assert "a dict of pictures: its images must be called images or image" in refusal(path)
    np.savez(path, images=np.array([{}, print], dtype=object))
    assert "is damaged, or more than arrays of numbers" in refusal(path)


def test_safetensors_say_more_of_themselves(images, tmp_path):
    path = tmp_path / "distilled.safetensors"
    tensors = {"images": images, "labels": ORDER, "soft_labels": LOGITS}
    tensors |= {"mean": torch.tensor([0.25]), "std": torch.tensor([0.5])}
    metadata = {"dataset": "digits", "space": "normalised", "syn_lr": "0.04"}
    save_file(tensors, path, metadata | {"label_form": "logits", "network": "ConvNetD2"})
    distilled = open_set(path, Stated())
    assert (distilled.syn_lr, distilled.label_form, distilled.model) == (
        0.04,
        "logits",
        "ConvNetD2",
    )
    assert distilled.normalisation.mean == (0.25,)
    assert "the file says: dataset digits" in said_of(distilled)
    assert "images: normalised, as the file says" in said_of(distilled)
    save_file(tensors, path, {"all": json.dumps(metadata | {"syn_lr": 1})})
    assert open_set(path, Stated(lr=0.1)).syn_lr == 0.1
    save_file(tensors, path, metadata | {"space": "wavelets"})
    assert "the file says space 'wavelets'; choices" in refusal(path, Stated())
    matrix = {"zca_mean": torch.zeros(64), "zca_matrix": torch.eye(64)}
    save_file({"images": images} | matrix, path)
    assert not open_set(path, Stated("digits", space="zca")).normalisation.needs_fit
    path.write_bytes(path.read_bytes()[:99])
    assert "is damaged" in refusal(path)


# pictures


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (8, 8)) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            grey = np.full(size, 20 * number + k, np.uint8)
            Image.fromarray(grey).save(folder / name / f"{name}_id{k:03}.png")
    return folder


@pytest.mark.parametrize("form", ["new{:03}", "{:05}", "class{}", "{}"])
def test_pictures_by_numbered_folders_or_by_names(tmp_path, form):
    folder = pictures(tmp_path / "set", [form.format(k) for k in range(10)])
    distilled = open_set(folder, Stated("digits"))
    levels = 255 * distilled.normalisation.inverse(distilled.images).mean((1, 2, 3))
    expected = 20.0 * ORDER + torch.tensor([0, 1] * 10)
    torch.testing.assert_close(levels, expected, atol=1e-3, rtol=0)
    assert torch.equal(distilled.labels, ORDER)


def test_pictures_that_say_too_little_are_refused(tmp_path):
    odd = pictures(tmp_path / "odd", ["cat", "dog", *map(str, range(8))])
    assert "are neither numbered nor those of the 10 classes" in refusal(odd, Stated("digits"))
    few = pictures(tmp_path / "few", ["0", "1"])
    assert "2 class folders" in refusal(few, Stated("digits"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(few / "1/x.png")
    assert "x.png is 9x9" in refusal(few, Stated("digits"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty")


def test_pictures_of_ones_own_classes(tmp_path):
    """The data set is a folder, too: its names say which class is which."""
    for split in ("train", "test"):
        pictures(tmp_path / "pets" / split, ["cat", "dog"], (10, 12))
    folder = pictures(tmp_path / "set", ["dog", "cat"])
    distilled = open_set(folder, Stated("folder", data_path=str(tmp_path / "pets")))
    assert distilled.class_names == ("cat", "dog")
    levels = 255 * distilled.normalisation.inverse(distilled.images).mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([20.0, 21.0, 0.0, 1.0]), atol=1e-3, rtol=0)
    argv = [
        "--distilled",
        str(folder),
        "--dataset",
        "folder",
        "--data_path",
        str(tmp_path / "pets"),
    ]
    assert evaluation.main([*argv, *EVAL]) == 0
    assert (tmp_path / "eval.json").exists()


# spaces and statistics


@pytest.mark.parametrize(
    ("values", "stated", "space", "why"),
    [
        ((-2.0, 2.0), {"space": "zca"}, "zca", "as said"),
        ((0.0, 1.0), {}, "unit", "since they have values from 0 to 1"),
        ((0.0, 1.0), {"space": "normalised"}, "normalised", "as said"),
        ((-0.3, 1.2), {"space": "unit"}, "unit", "as said (values from -0.3 to 1.2)"),
    ],
)
def test_the_space_is_proved_or_said(tmp_path, values, stated, space, why):
    images = torch.linspace(*values, 640).view(10, 1, 8, 8)
    distilled = open_set(save(images, tmp_path / "x.pt"), Stated("digits", **stated))
    assert f"images: {space}, {why}" in said_of(distilled)
    assert torch.equal(distilled.images, images) == (space != "unit")
    assert distilled.normalisation.zca == (space == "zca")


def test_a_space_that_nothing_proves_is_asked_for(images, tmp_path):
    path = save(images, tmp_path / "x.pt")
    words = refusal(path, Stated("digits"))
    assert re.search("values from -.* to .*: --space normalised or --space zca$", words)
    path = save(images * 9, tmp_path / "x.pt")
    assert "no pixels in [0, 1]" in refusal(path, Stated("digits", space="unit"))
    path = save(images, tmp_path / "x.pt")
    assert "whitened ones have none" in refusal(
        path, Stated("digits", space="zca", statistics=("mtt",))
    )


CIFAR100 = Source(
    tuple(map(str, range(100))), 3, 32, {}, {}, normalisation=CIFAR_NORMALISATION, name="CIFAR100"
)


def test_of_two_statistics_the_code_or_the_user_says_which():
    images = torch.linspace(-2, 2, 100 * 3072).view(100, 3, 32, 32)
    stated, path = Stated(space="normalised"), Path("x.pt")
    with pytest.raises(UserError, match=r"--statistics mtt \(.*\) or --statistics dc \(\(0.5071"):
        brought(Content("a tensor", images), path, stated, CIFAR100)

    def used(content: Content, *statistics: str) -> Normalisation:
        said = Stated(space="normalised", statistics=statistics)
        return brought(content, path, said, CIFAR100).normalisation

    plain = Content("a tensor", images)
    assert used(Content("dict", images, statistics="dc")) == OF_DC["CIFAR100"]
    assert used(Content("images_*.pt", images, statistics="mtt")) == CIFAR_NORMALISATION
    assert used(plain, "mtt") == CIFAR_NORMALISATION
    assert used(plain, "dc").mean[0] == 0.5071
    own = used(plain, *"0.5 0.5 0.4 0.2 0.2 0.25".split())
    assert (own.mean, own.std) == ((0.5, 0.5, 0.4), (0.2, 0.2, 0.25))
    for wrong in (["0.5"], ["own"], "0.5 0.5 0.4 0.2 0.2 0".split(), ["nan"] * 6):
        with pytest.raises(UserError, match="give mtt or dc, or 3 means and then 3 standard"):
            used(plain, *wrong)


def test_the_path_may_say_the_data_set(tmp_path, cifar10_path):
    path = save(torch.rand(10, 3, 32, 32), tmp_path / "logged_files/CIFAR10/run/images_best.pt")
    distilled = open_set(path, Stated(data_path=str(cifar10_path)))
    assert (distilled.dataset, distilled.model) == ("CIFAR10", "ConvNetD3")
    assert "data set: CIFAR10, as the path says" in said_of(distilled)
    assert distilled.normalisation == CIFAR_NORMALISATION


def test_a_data_set_that_nothing_says_is_asked_for(images, tmp_path):
    path = save(images, tmp_path / "x.pt")
    assert "1x8x8 of an unknown data set: --dataset says which, such as digits" in refusal(
        path, Stated()
    )
    both = save(torch.rand(10, 3, 32, 32), tmp_path / "cifar10/svhn.pt")
    assert "such as CIFAR10, CIFAR100, SVHN" in refusal(both, Stated())
    assert "are not of CIFAR10 (3x32x32)" in refusal(path, Stated("CIFAR10", space="unit"))
    assert [usual_network(side)[-1] for side in (8, 28, 32, 64, 128, 224)] == [*"133455"]


# what is damaged or hostile


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "holds a dict of nothing; known are"),
        ({"net": torch.ones(2)}, "holds a dict of net; known are"),
        ([torch.ones(2)], "holds a list of 1; known are"),
        ("text", "holds a str; known are"),
        (None, "holds a NoneType; known are"),
        (torch.ones(20, 64), r"the shape \[20, 64\], not \(N, C, H, W\) with H = W"),
        (torch.ones(20, 1, 8, 9), r"\[20, 1, 8, 9\]"),
        (torch.ones(0, 1, 8, 8), "have no values"),
        (torch.ones(1).expand(10**6, 3, 32, 32), "have no values"),
        (torch.full((10, 1, 8, 8), float("inf")), "no finite numbers"),
        (torch.ones(10, 1, 8, 8, dtype=torch.complex64), "no plain tensor"),
        (torch.ones(10, 1, 8, 8).to_sparse(), "no plain tensor"),
        (torch.ones(11, 1, 8, 8), "11 images without labels cannot be class by class of 10"),
        ({"images": [1.0]}, "images are a list"),
        ({"config": {}}, "is not a distilled set: it lacks images"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_other_content_is_named(tmp_path, value, words):
    assert re.search(words, refusal(save(value, tmp_path / "x.pt")))


class Runs:
    """As a pickle it makes a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_file_is_never_run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    hostile = Runs(marker)
    for name, value in {
        "data": {"data": [[images, hostile]]},
        "pair": [images, hostile],
        "rate": {"images": images, "lr": hostile},
    }.items():
        words = refusal(save(value, tmp_path / f"{name}.pt"))
        assert "is damaged, or more than tensors and plain values" in words
    (tmp_path / "list.pt").write_bytes(pickle.dumps([images, hostile]))
    refusal(tmp_path / "list.pt")
    for name, content in trapped("marker").items():
        for suffix in (".pt", ".npz"):
            path = tmp_path / f"{name}{suffix}".replace(" ", "_")
            path.write_bytes(content)
            refusal(path)
    save(images, tmp_path / "images_best.pt")
    save(hostile, tmp_path / "labels_best.pt")
    assert "labels_best.pt is damaged" in refusal(tmp_path / "images_best.pt")
    assert not marker.exists()


@pytest.mark.parametrize("rate", [-0.01, 0.0, float("nan"), [0.1], "a", torch.ones(2)])
def test_a_rate_that_trains_nothing_is_refused(images, tmp_path, rate):
    path = save(images, tmp_path / "images_best.pt")
    value = torch.tensor(rate) if isinstance(rate, float) else rate
    save(value, tmp_path / "lr_best.pt")
    assert "lr_best.pt" in refusal(path)


# the scripts


def accuracies(folder: Path, **where) -> list[list[float]]:
    entries = json.loads((folder / "eval.json").read_text())
    return [each["accs"] for each in entries if where.items() <= each.items()]


def test_a_set_of_another_code_is_measured_as_a_set_of_ours(data, images, tmp_path, capsys):
    """The same images as a file of our own, of another code, and converted: the same accuracies."""
    config = {"batch_train": 256, "dsa_strategy": "color_crop_cutout_flip_scale_rotate"}
    ours = digits_set(data, images, model="MLP", set="raw", ipc=2, labels=ORDER, config=config)
    for name in ("ours", "theirs", "converted"):
        (tmp_path / name).mkdir()
    ours.save(tmp_path / "ours/distilled_x.pt", include_whitening=True)
    theirs = save(images, tmp_path / "theirs/images_best.pt")
    save(torch.tensor(0.02, dtype=torch.float64), tmp_path / "theirs/lr_best.pt")
    out = tmp_path / "converted/distilled_x.pt"
    flags = "--dataset digits --space normalised".split()
    assert convert.main([str(theirs), str(out), *flags, "--model", "MLP"]) == 0
    converted = SyntheticSet.load(out)
    assert (converted.syn_lr, converted.model) == (0.02, "MLP")
    with pytest.raises(UserError, match="is there already"):
        convert.main([str(theirs), str(out), *flags])

    for path, more in ((tmp_path / "ours/distilled_x.pt", []), (theirs, flags), (out, [])):
        capsys.readouterr()
        assert evaluation.main(["--distilled", str(path), *EVAL, *more]) == 0
        told = capsys.readouterr().out
        assert ("imported from images_best.pt: images_*.pt" in told) == ("ours" not in str(path))
        assert ("images: normalised, as said" in told) == ("ours" not in str(path))
    wanted = accuracies(tmp_path / "ours")
    assert wanted == accuracies(tmp_path / "theirs") == accuracies(tmp_path / "converted")
    (entry,) = json.loads((tmp_path / "theirs/eval.json").read_text())
    assert entry["imported"]["file"] == "images_best.pt"


def test_datms_evaluation_is_called_as_published(images, tmp_path, capsys):
    save(images, tmp_path / "a.pt"), save(LOGITS, tmp_path / "b.pt")
    save(torch.tensor(0.02), tmp_path / "c.pt")
    argv = ["--data_dir", str(tmp_path / "a.pt"), "--label_dir", str(tmp_path / "b.pt")]
    argv += ["--lr_dir", str(tmp_path / "c.pt"), "--dataset", "digits", "--zca"]
    assert evaluation.main([*argv, *EVAL, "--no_random"]) == 0
    told = capsys.readouterr().out
    assert "--zca: taken as --space zca" in told
    assert "fitting ZCA on the training images" in told
    assert re.search(r"distilled raw, soft labels +MLP +0\.02", told)


def test_flags_for_other_codes_have_no_effect_on_own_sets(data, images, tmp_path, capsys):
    path = tmp_path / "distilled_x.pt"
    ours = digits_set(data, images[::2], model="MLP", set="raw", config={"batch_train": 9})
    ours.save(path, include_whitening=True)
    opened = open_set(path, Stated("CIFAR10", lr=3.0))
    assert (opened.dataset, opened.syn_lr) == ("digits", ours.syn_lr)
    assert "--dataset --lr: no effect here" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(images, tmp_path):
    path = save(images, tmp_path / "images_best.pt")
    done = run("eval.py", "--distilled", path, "--dataset", "digits")
    assert done.returncode == 2
    assert re.fullmatch("eval.py: error: .*--space normalised or --space zca\n", done.stderr)
    out = str(tmp_path / "distilled_x.pt")
    for argv, words in (
        ([str(path), out, "--dataset", "digits"], "--space normalised or --space zca"),
        ([str(tmp_path / "none.pt"), out], "no distilled set at .*none.pt"),
        ([str(tmp_path / "none.npz"), out], "no distilled set at .*none.npz"),
        ([str(path), str(tmp_path / "x.txt")], "the file is a .pt"),
        ([str(path)], "the following arguments are required: out"),
    ):
        with pytest.raises(UserError, match=words):
            convert.main(argv)
    assert not Path(out).exists()
