"""Pictures, links, names and folders, odd, broken or hostile: used as meant, or named in a line."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from scripts.faults.damage import NO_FILES, damaged_bytes
from utils.core.errors import UserError
from utils.data import decode as image_tree
from utils.data.dataset import find_dataset, load_dataset
from utils.data.real_images import random_real_images

RED, BLUE, GREY, WHITE = (255, 0, 0), (0, 0, 255), (120, 120, 120), (255, 255, 255)
RES = 8
NOT_UTF8 = os.fsdecode(b"\xff\xfeno text")
examples = partial(
    settings, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)  # the same in every run


def plain(colour: tuple[int, ...] = GREY, size: tuple[int, int] = (12, 12)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (40, 40)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def animated(kind: str, **options: object) -> bytes:
    """Red, then blue."""
    return encoded(plain(RED), kind, save_all=True, append_images=[plain(BLUE)], **options)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG chunk by chunk, for what Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def grey16() -> Image.Image:
    return Image.fromarray(np.full((12, 12), 120 * 257 + 60, dtype=np.uint16))


def decoded(path: Path, res: int = RES) -> torch.Tensor:
    return image_tree.decode([path], image_tree.Decoding(res))[0]


def refusal(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` ends in: one line that can be printed anywhere."""
    with pytest.raises(UserError) as raised:
        action()
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    message.encode()
    return message


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two training and one test picture each."""
    for level, name in ((10, "cat"), (100, "dog")):
        for file in (f"train/{name}/0.png", f"train/{name}/1.png", f"test/{name}/0.png"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            plain((level,) * 3).save(tmp_path / file)
    return tmp_path


def load(tree: Path):
    return load_dataset("folder", data_path=tree, res=RES)


# pictures that are odd but whole

CLEAR, HALF_CLEAR = (Image.new("RGBA", (9, 9), (0, 0, 0, alpha)) for alpha in (0, 135))
BIT, PALETTE = Image.new("1", (9, 9), 1), Image.new("P", (9, 9), 0)
RED_CMYK = plain(RED).convert("CMYK")
RED_PALETTE = plain(RED).convert("P", palette=Image.Palette.ADAPTIVE)
ODD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff"
GREY16 = struct.pack(">H", 120 * 257)
ODD = {
    "animated.gif": (animated("GIF"), RED),
    "animated.webp": (animated("WEBP", lossless=True), RED),
    "animated.png": (animated("PNG"), RED),
    "pages.tif": (animated("TIFF"), RED),
    "stereo.jpg": (animated("MPO", quality=100), RED),
    "grey 16 bit.png": (encoded(grey16(), "PNG"), GREY),
    "grey 16 bit.tif": (encoded(grey16(), "TIFF"), GREY),
    "grey 16 bit.pgm": (b"P5 2 2 65535\n" + GREY16 * 4, GREY),
    "rgb 16 bit.png": (png(2, 2, 16, 2, (b"\0" + GREY16 * 6) * 2), GREY),
    "cmyk.jpg": (encoded(RED_CMYK, "JPEG", quality=100), RED),
    "cmyk.tif": (encoded(RED_CMYK, "TIFF"), RED),
    "clear.png": (encoded(CLEAR, "PNG"), WHITE),
    "half clear.webp": (encoded(HALF_CLEAR, "WEBP", lossless=True), GREY),
    "grey and alpha.png": (encoded(Image.new("LA", (9, 9), (0, 135)), "PNG"), GREY),
    "palette and alphas.png": (encoded(PALETTE, "PNG", transparency=bytes([0])), WHITE),
    "palette with a clear colour.gif": (encoded(PALETTE, "GIF", transparency=0), WHITE),
    "a clear colour.png": (encoded(plain(BLUE), "PNG", transparency=BLUE), WHITE),
    "palette.bmp": (encoded(RED_PALETTE, "BMP"), RED),
    "palette.gif": (encoded(RED_PALETTE, "GIF"), RED),
    "lab.tif": (encoded(Image.new("LAB", (9, 9), (128,) * 3), "TIFF"), (119,) * 3),
    "1 bit.png": (encoded(BIT, "PNG"), WHITE),
    "fax.tif": (encoded(BIT, "TIFF", compression="group4"), WHITE),
    "1 bit.ppm": (encoded(BIT, "PPM"), WHITE),
    "broken exif.jpg": (encoded(plain(GREY), "JPEG", quality=100, exif=ODD_EXIF), GREY),
    "another suffix.png": (encoded(plain(GREY), "JPEG", quality=100), GREY),
    "UPPER.PNG": (encoded(plain(GREY), "PNG"), GREY),
    "one pixel.png": (encoded(plain(GREY, (1, 1)), "PNG"), GREY),
    "thin.png": (encoded(plain(GREY, (1, 20_000)), "PNG"), GREY),
    "flat.png": (encoded(plain(GREY, (20_000, 1)), "PNG"), GREY),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_used(tree, name):
    content, colour = ODD[name]
    (tree / "train/cat/0.png").unlink()
    (tree / "train/cat" / name).write_bytes(content)
    train = load(tree).train
    assert train.images.shape == (4, 3, RES, RES)
    shown = decoded(tree / "train/cat" / name)
    wanted = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, RES, RES)
    assert (shown.int() - wanted.int()).abs().max() <= 2


MODES = {
    "BMP": ("L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("L", "LA", "I;16", "P", "RGB", "RGBA"),
    "PPM": ("L", "RGB", "I;16"),
    "TIFF": ("L", "LA", "I;16", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
    "WEBP": ("L", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(k, mode) for k in MODES for mode in MODES[k]])
def test_every_kind_of_picture_keeps_its_grey(tmp_path, kind, mode):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read the YCbCr TIFF that it writes")
    picture = grey16() if mode == "I;16" else Image.new("L", (8, 8), 120).convert(mode)
    (tmp_path / "a.png").write_bytes(encoded(picture, kind))
    assert (decoded(tmp_path / "a.png").int() - 120).abs().max() <= (kind in ("JPEG", "WEBP"))


@pytest.mark.parametrize("size", [(50, 31), (31, 77), (13, 9), (24, 24), (100, 16), (1, 1)])
def test_pictures_are_resized_and_cropped_as_by_torchvision(tmp_path, size):
    noise(size).save(tmp_path / "a.png")
    reference = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    expected = torch.from_numpy(np.array(reference(noise(size)))).permute(2, 0, 1)
    assert (decoded(tmp_path / "a.png", 16).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    list(enumerate(["top left", "top right", "bottom right", "bottom left"] * 2, start=1)),
)
def test_every_orientation_is_set_upright(tmp_path, kind, orientation, corner):
    """The stored picture is dark in its top left quarter alone."""
    values = np.full((16, 16), 255, dtype=np.uint8)
    values[:8, :8] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(values), kind, exif=exif))
    quarters = decoded(path, 16)[0].float().unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))
    names = ["top left", "top right", "bottom left", "bottom right"]
    assert names[int(quarters.flatten().argmin())] == corner


def test_a_large_photograph_is_no_reason_to_warn(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plain(size=(15, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(path).close()
        assert [w.category for w in caught] == [Image.DecompressionBombWarning]
        caught.clear()
        decoded(path)
    assert caught == []


# pictures that are refused


# A few bytes that declare 20,000 x 20,000 pixels.
BOMB_BMP = struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 20_000, 20_000, 1, 24, *[0] * 6)
FLOATS = Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32))
INTEGERS = Image.fromarray(np.full((9, 9), 70_000, dtype=np.int32))
REFUSED = {
    "empty.png": (b"", "not a picture"),
    "text.jpg": (b"no picture", "not a picture"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "not a picture"),
    "code.png": (encoded(plain(), "EPS"), "not a picture"),
    "document.png": (encoded(plain(), "PDF"), "not a picture"),
    "bomb.png": (png(20_000, 20_000, 8, 2, bytes(1000)), "400000000 pixels"),
    "bomb.bmp": (b"BM" + BOMB_BMP, "400000000 pixels"),
    "float.tif": (encoded(FLOATS, "TIFF"), "8 or 16 bits"),
    "float.ppm": (b"Pf 1 1 -1\n" + struct.pack("<f", 0.5), "8 or 16 bits"),
    "whole numbers.tif": (encoded(INTEGERS, "TIFF"), "8 or 16 bits"),
}
WHOLE = {"BMP": "bmp", "GIF": "gif", "JPEG": "jpg", "PNG": "png", "PPM": "ppm", "WEBP": "webp"}
WHOLE |= {"TIFF": "tif"}
for kind, suffix in WHOLE.items():
    content = encoded(noise(), kind)
    REFUSED[f"half.{suffix}"] = (content[: len(content) // 2], "half")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_is_named(tree, name):
    content, reason = REFUSED[name]
    path = tree / "train/cat" / name
    path.write_bytes(content)
    message = refusal(lambda: load(tree))
    assert str(path) in message and reason in message


def test_a_picture_that_may_not_be_read_is_named(tree):
    path = tree / "train/cat/1.png"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert str(path) in refusal(lambda: load(tree))


NAMED = {"a link to itself": "symbolic links", "a link to nowhere": "No such file"}


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "a folder"])
def test_what_is_no_file_is_named_and_never_waited_for(tree, kind):
    path = tree / "train/cat/2.png"
    NO_FILES[kind](path)
    message = refusal(lambda: load(tree))
    assert str(path) in message and NAMED.get(kind, "is no file") in message


def test_links_to_pictures_and_to_class_folders_are_followed(tree):
    (tree / "elsewhere").mkdir()
    (tree / "train/cat").rename(tree / "elsewhere/cats")
    (tree / "train/cat").symlink_to("../elsewhere/cats")
    (tree / "train/cat/2.png").symlink_to("0.png")
    assert load(tree).train.labels.tolist() == [0, 0, 0, 1, 1]


def test_what_is_hidden_no_picture_or_a_link_to_a_parent_does_no_harm(tree):
    (tree / "train/cat/notes.txt").write_text("no picture")
    (tree / "train/cat/.0.png").write_text("nor this")
    (tree / "train/cat/more").mkdir()
    (tree / "train/.git").mkdir()
    (tree / "train/cat/up").symlink_to("..")
    (tree / "train/cat/here.png").symlink_to(".")
    (tree / "train/cat/folder.png").mkdir()
    (tree / "train/nowhere").symlink_to("nothing")
    assert load(tree).train.labels.tolist() == [0, 0, 1, 1]


def test_a_class_that_is_a_link_to_its_parent_is_named(tree):
    for split in ("train", "test"):
        (tree / split / "again").symlink_to(".")
    message = refusal(lambda: load(tree))
    assert "no images in the class folder" in message and str(tree / "train/again") in message


def test_a_name_that_no_file_can_have_is_named(tmp_path):
    message = refusal(lambda: image_tree.fingerprint([tmp_path / "a\0b.png"], RES))
    assert r"a\x00b.png" in message


# names

ANY_SCRIPT = ["图片", "صورة", "می‌خواهم", "तस्वीर", "İıß", "🐱‍👤", "e\u0301", "a b", "-rf", "'it\"s'"]
HOSTILE = ["a\nb", "a\r\nb", "\x1b[31m", "a\u2028b", NOT_UTF8, "-", "%s{}", "x" * 250]


@pytest.mark.parametrize("name", [*ANY_SCRIPT, *HOSTILE])
def test_a_file_may_have_any_name(tree, name):
    path = tree / f"train/cat/{name}.png"
    plain().save(tree / "whole.png")
    (tree / "whole.png").rename(path)
    train = load(tree).train
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(load(tree).train.images, train.images)
    path.write_bytes(b"broken")
    message = refusal(lambda: load(tree))
    assert "train/cat/" in message and ".png" in message
    path.unlink()
    path.symlink_to("nowhere")
    assert "train/cat/" in refusal(lambda: load(tree))


@pytest.mark.parametrize("name", [*ANY_SCRIPT, "%s{}", "x" * 250, "x.png"])
def test_a_class_may_have_a_name_in_any_script(tree, name):
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / name)
    data = load(tree)
    assert set(data.class_names) == {name, "dog"}


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31m", "a\u2028b", "a\x85b", NOT_UTF8])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_whose_name_cannot_be_written_is_refused_at_once(tree, split, name):
    (tree / split / "cat").rename(tree / split / name)
    message = refusal(lambda: find_dataset("folder", data_path=tree))
    assert str(tree / split) in message and "rename" in message


# folders


@pytest.mark.parametrize("dataset", ["CIFAR10", "Tiny", "ImageNet", "folder"])
def test_a_data_path_that_is_a_file_is_named(tmp_path, dataset):
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK")
    subset = "imagenette" if dataset == "ImageNet" else None
    message = refusal(lambda: find_dataset(dataset, data_path=path, subset=subset))
    assert f"{path} is no folder" in message


@pytest.mark.parametrize("name", ["circle", "~nobody-has-this-name", "a\0b"])
def test_a_data_path_that_leads_nowhere_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    assert "--data_path" in refusal(lambda: find_dataset("folder", data_path=name))


def test_a_folder_that_may_not_be_looked_into_is_named(tree, monkeypatch):
    def refuse(*args: object) -> bool:
        raise PermissionError(13, "Permission denied", str(tree / "train"))

    monkeypatch.setattr(Path, "is_dir", refuse)
    message = refusal(lambda: find_dataset("folder", data_path=tree))
    assert str(tree) in message and "Permission denied" in message


def test_fewer_pictures_than_asked_for_are_named(tree):
    plain().save(tree / "train/cat/2.png")
    message = refusal(lambda: random_real_images(load(tree), 3, torch.Generator()))
    assert message == (
        "--ipc 3 is more than the 2 training images of class dog: choose at most that many"
    )


# properties


PICTURES = [*[encoded(noise((6, 6)), kind) for kind in WHOLE], animated("GIF"), b"P6 3 3 255 "]


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is odd in the file
@examples(max_examples=400)
@given(st.sampled_from(PICTURES), st.randoms(use_true_random=False))
def test_a_damaged_picture_is_a_picture_or_one_line(tmp_path_factory, whole, rng):
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(damaged_bytes(rng, whole))
    try:
        image = decoded(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert image.shape == (3, RES, RES) and image.dtype == torch.uint8
