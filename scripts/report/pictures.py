"""The sets of a run as strips of pictures, one a class, few and small enough for one page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from utils.core.errors import UserError
from utils.core.pictures import MAX_COLUMNS, MIN_SIDE
from utils.data.distilled import SyntheticSet

MOST_FRAMES, MOST_CLASSES, MOST_IMAGES = 10, 100, 10
MOST_SIDE = 64  # of an image, in pixels
MOST_PIXELS = 3_000_000  # of all frames
GAP = 1  # white pixels behind each image of a strip
COLUMNS = 10  # of a sheet with one image a class


@dataclass(frozen=True)
class Frame:
    """One set of the run: its name for people, and the strip of each class that is shown."""

    iteration: int
    tags: tuple[str, ...]
    strips: Sequence[str]  # data URIs of PNGs

    @property
    def name(self) -> str:
        chosen = [tag for tag in self.tags if not tag.isdecimal()]
        return f"iteration {self.iteration:,}" + (f" ({', '.join(chosen)})" if chosen else "")


@dataclass(frozen=True)
class Gallery:
    """The sets of a run over its iterations; `notes` say what is not shown, or not as it is."""

    frames: Sequence[Frame] = ()
    class_names: Sequence[str] = ()
    notes: Sequence[str] = ()
    shown: int = 1  # images in a strip
    best: Path | None = None  # the set to train on

    @property
    def start(self) -> int:
        """The frame to begin with: that of the best set, else the last one."""
        best = [n for n, frame in enumerate(self.frames) if "best" in frame.tags]
        return best[0] if best else len(self.frames) - 1


@dataclass
class _Kept:
    """What is found of one iteration: the tags under which its set was saved."""

    iteration: int
    tags: list[str] = field(default_factory=list)


def gallery(folder: Path, *, ipc: int, side: int | None, class_names: Sequence[str]) -> Gallery:
    """Read the raw sets in the run directory `folder`, or their pictures where that does not do.

    `side` and `class_names` are those of the run's settings: a set knows its own.
    """
    notes: list[str] = []
    kept, best = _find(folder, notes)
    chosen = _choose(kept)
    if len(chosen) < len(kept):
        notes.append(f"{len(chosen)} of {len(kept)} saved iterations are shown.")
    frames: list[Frame] = []
    names, shown = list(class_names), 1
    for each in chosen:
        images = _images(folder, each.tags, ipc=ipc, side=side, classes=len(names), notes=notes)
        if images is None:
            continue
        pixels, found = images
        names = list(found) or names or [str(n) for n in range(len(pixels))]
        strips, shown = _strips(pixels, len(chosen), notes)
        frames.append(Frame(each.iteration, tuple(each.tags), strips))
    if frames and len(frames[0].strips) < len(names):
        notes.append(f"The first {len(frames[0].strips)} of {len(names)} classes are shown.")
    return Gallery(frames, names, tuple(dict.fromkeys(notes)), shown, best)


def _find(folder: Path, notes: list[str]) -> tuple[list[_Kept], Path | None]:
    """The saved iterations in order, and the set to train on."""
    files = [*folder.glob("distilled_*.pt"), *folder.glob("images_*.png")]
    tags = {file.stem.partition("_")[2] for file in files}
    kept = {int(tag): _Kept(int(tag), [tag]) for tag in tags if tag.isdecimal()}
    best = None
    for tag in ("last", "best"):
        file = folder / f"distilled_{tag}.pt"
        if file.exists():
            try:
                iteration = SyntheticSet.load(file).iteration
            except UserError as error:
                notes.append(f"{' '.join(str(error).split())}.")
                continue
            kept.setdefault(iteration, _Kept(iteration)).tags.append(tag)
            best = file
        elif tag in tags and not kept:  # a picture alone, of an iteration that it does not tell
            kept[0] = _Kept(0, [tag])
    return [kept[iteration] for iteration in sorted(kept)], best


def _choose(kept: Sequence[_Kept]) -> list[_Kept]:
    """As many as are shown: the first, the last, the named ones, and others evenly between."""
    if len(kept) <= MOST_FRAMES:
        return list(kept)
    named = {n for n, each in enumerate(kept) if {"best", "last"} & {*each.tags}}
    named |= {0, len(kept) - 1}
    free = MOST_FRAMES - len(named)
    step = (len(kept) - 1) / (free + 1)
    return [kept[n] for n in sorted(named | {round(step * (i + 1)) for i in range(free)})]


def _images(
    folder: Path,
    tags: Sequence[str],
    *,
    ipc: int,
    side: int | None,
    classes: int,
    notes: list[str],
) -> tuple[Tensor, Sequence[str]] | None:
    """The images of one iteration in [0, 1], (classes, ipc, C, H, W), and the classes' names."""
    for tag in reversed(tags):
        try:
            found = SyntheticSet.load(folder / f"distilled_{tag}.pt")
        except UserError:
            continue
        if not found.normalisation.needs_fit:
            images = found.normalisation.inverse(found.images.float())
            return images.unflatten(0, (len(found.class_names), -1)), found.class_names
        side, classes = found.images.shape[-1], len(found.class_names)
    for tag in tags:  # whitened, without the way back: the picture beside the set has gone it
        cut = _cut_sheet(folder / f"images_{tag}.png", ipc=ipc, side=side, classes=classes)
        if cut is not None:
            return cut, ()
    notes.append(f"The set of iteration {tags[0]} can be read neither as a set nor as a picture.")
    return None


def _cut_sheet(path: Path, *, ipc: int, side: int | None, classes: int) -> Tensor | None:
    """Cut the images (classes, ipc, 3, side, side) out of a sheet of `save_grid`; None where the
    file is not one.
    """
    if side is None:
        return None
    try:
        sheet = Image.open(path).convert("RGB")
        sheet.load()
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    factor = max(1, MIN_SIDE // side)
    padding = 2 * max(1, factor // 4)
    cell = side * factor + padding
    columns, rows = (sheet.width - padding) // cell, (sheet.height - padding) // cell
    if columns * cell + padding != sheet.width or rows * cell + padding != sheet.height:
        return None
    rows_a_class = -(-ipc // MAX_COLUMNS)
    classes = classes or (columns * rows if ipc == 1 else rows // rows_a_class)
    cells = []
    for label in range(classes):
        for number in range(ipc):
            at = divmod(label, COLUMNS) if ipc == 1 else divmod(number, MAX_COLUMNS)
            row, column = at if ipc == 1 else (label * rows_a_class + at[0], at[1])
            if row >= rows or column >= columns:
                return None
            left, top = padding + column * cell, padding + row * cell
            box = (left, top, left + side * factor, top + side * factor)
            image = sheet.crop(box).resize((side, side), Image.Resampling.NEAREST)
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            cells.append(values.view(side, side, 3).permute(2, 0, 1) / 255)
    return torch.stack(cells).unflatten(0, (classes, ipc))


def _strips(images01: Tensor, frames: int, notes: list[str]) -> tuple[list[str], int]:
    """A PNG of the first images of each of the first classes, for one of so many frames; also how
    many images of a class that are.
    """
    classes, ipc, channels, height, width = images01.shape
    scale = min(1.0, MOST_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shown_classes = min(classes, MOST_CLASSES)
    room = MOST_PIXELS // (frames * shown_classes * size[0] * size[1])
    shown = max(1, min(ipc, MOST_IMAGES, room))
    if shown < ipc:
        notes.append(f"The first {shown} of the {ipc} images of a class are shown.")
    if scale < 1:
        notes.append(f"Images of {height}x{width} pixels are shown at {size[0]}x{size[1]}.")
    images01 = images01[:shown_classes, :shown]
    if channels not in (1, 3):
        first = 1 if channels == 2 else 3
        notes.append(
            f"Of the {channels} channels the first {'is' if first == 1 else 'three are'} shown"
            f"{'' if first == 1 else ', as red, green and blue'}."
        )
        images01 = images01[:, :, :first]
    flat = images01.flatten(0, 1).clamp(0, 1)
    if scale < 1:
        flat = F.interpolate(flat, size=size, mode="bilinear", antialias=True)
    spaced = F.pad(flat, (0, GAP), value=1.0).mul(255).round().to(torch.uint8)
    by_class = spaced.unflatten(0, (shown_classes, shown))
    return [_data_uri(torch.cat(list(each), dim=-1)[..., :-GAP]) for each in by_class], shown


def _data_uri(pixels: Tensor) -> str:
    """uint8 pixels (1 or 3, H, W) as a PNG in a data URI."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
