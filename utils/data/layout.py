"""Find the splits, classes and files of a folder of the user's own pictures."""

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.core.errors import UserError
from utils.data.folders import (
    IMAGE_SUFFIXES,
    counted,
    image_files,
    in_order,
    left_out,
    list_images,
    some,
)
from utils.data.folders import class_names as class_folders
from utils.data.source import DataRequest, SplitName, divide
from utils.data.values import shown

Files = list[tuple[Path, int]]  # (image file, label)

FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_name", "path", "id", "image_id")
LABEL_COLUMNS = ("label", "class", "category", "target", "y", "class_name")
TABLE_BYTES = 2**28


@dataclass(frozen=True)
class Layout:
    """What a folder holds: classes by label, files of each split, and lines that say how they were
    found and what is left out.
    """

    class_names: tuple[str, ...]
    files: dict[SplitName, Files]
    lines: list[str] = field(default_factory=list)


def lay_out(request: DataRequest) -> Layout:
    """Find the splits asked for in `request.root`.

    Each is a folder `train`, `test` or `val` of class folders, or of files that a CSV labels. Where
    there is no `test`, `val` is that. With `test_fraction` there is neither: the test images are a
    part of the training images, which lie in `train` or in the folder itself.

    Raises:
        UserError: a split is missing, or the splits have different classes, or there is only one.
    """
    root = request.root
    has_train = (root / "train").is_dir()
    found = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if request.test_fraction > 0:
        if found:
            raise UserError(
                f"--test_fraction {request.test_fraction} is for folders without test images, but "
                f"{found[0]} is there: leave --test_fraction out, or give another --data_path"
            )
        return _divided(request, root / "train" if has_train else root)
    places: dict[SplitName, Path] = {"train": root / "train"} if has_train else {}
    places |= dict(zip(("test", "val"), found, strict=False))  # type: ignore[arg-type]
    if "test" not in places or not {"train", "test"} & {*request.splits} <= {*places}:
        raise UserError(_missing(request, places))
    unused = "val" in places and "val" not in request.splits
    named = read_folders({s: places[s] for s in request.splits if s in places}, tables_in=root)
    if unused:
        named.lines.append(
            f"{places['val']} is not used in this call: it is there for distill_att.py "
            "--select val without --val_fraction"
        )
    if "test" in places and places["test"].name == "val":
        named.lines.append(f"test images are those of {places['test']}: there is no test/")
    return named


def _missing(request: DataRequest, places: Mapping[SplitName, Path]) -> str:
    """Say which folders were looked for, and what can be done."""
    root, advice = request.root, "make a folder a class in each, or give another --data_path"
    whole = places.get("train", root)
    if "test" not in places and (whole.name == "train" or _looks_whole(whole)):
        return (
            f"no test images in {root}: looked for the folders test and val; pass --test_fraction "
            f"0.2, say, to buffer.py and distill_att.py alike to hold out a part of {whole}, or "
            f"put test images into {root / 'test'}"
        )
    wanted = [*(["train"] if "train" in request.splits else []), "test or val"]
    return f"no data: looked for the folders {' and '.join(wanted)} in {root}; {advice}"


def _looks_whole(folder: Path) -> bool:
    """Whether there are classes in `folder` itself."""
    if not folder.is_dir():
        return False
    return bool(_table(folder, "train", folder)) or any(
        image_files(folder / name) for name in class_folders(folder)
    )


def _divided(request: DataRequest, whole: Path) -> Layout:
    """Hold test images out of the training images of every class."""
    if not whole.is_dir() or not (whole.name == "train" or _looks_whole(whole)):
        raise UserError(_missing(request, {}))
    layout = read_folders({"train": whole}, tables_in=request.root)
    files, fraction = layout.files["train"], request.test_fraction
    labels = torch.tensor([label for _, label in files])
    parts = divide(labels, fraction, layout.class_names, "test")
    members = {split: [files[at] for at in parts[split].tolist()] for split in ("train", "test")}
    line = f"--test_fraction {fraction}: {len(members['test'])} of {len(files)} images of {whole} "
    return Layout(
        layout.class_names,
        {split: members[split] for split in request.splits if split in members},
        [*layout.lines, line + "are test images, never trained on"],
    )


def read_folders(folders: Mapping[SplitName, Path], tables_in: Path | None = None) -> Layout:
    """List the files of splits that have the same classes.

    Where files lie flat in a folder, the CSV that labels them is looked for beside them and in
    `tables_in`; None: there may be none.
    """
    listed = {split: _listed(split, folder, tables_in) for split, folder in folders.items()}
    compared = "test" if "test" in listed else next(iter(listed))
    names = listed[compared].class_names
    for split, layout in listed.items():
        if odd := {*layout.class_names}.symmetric_difference(names):
            raise UserError(
                f"{folders[split]} and {folders[compared]} must have the same classes; "
                f"only one of them has {some(odd)}"
            )
    if len(names) == 1:
        raise UserError(
            f"{folders[compared]} has one class, {names[0]}: there is nothing to tell apart, so "
            "give a folder of two classes or more"
        )
    return Layout(
        names,
        {split: layout.files[split] for split, layout in listed.items()},
        [line for layout in listed.values() for line in layout.lines],
    )


def _listed(split: SplitName, folder: Path, tables_in: Path | None) -> Layout:
    names = class_folders(folder)
    has_classes = any(image_files(folder / name) for name in names)
    table = None if tables_in is None or has_classes else _table(folder, split, tables_in)
    if table is not None:
        return _labelled(split, folder, table)
    if not names:
        csv_too = "" if tables_in is None else f", or {folder}/labels.csv with file,label lines"
        raise UserError(f"no class folders in {folder}: put images into {folder}/<class>/{csv_too}")
    inside = [folder / name for name in names]
    files = list_images(inside)
    others = left_out(folder, inside)
    for each in inside:
        others += left_out(each, image_files(each))
    return Layout(names, {split: files}, _left_out_line(folder, others))


def _left_out_line(folder: Path, others: Mapping[str, int]) -> list[str]:
    return [f"left out of {folder}: {counted(others)}"] if others else []


# labels in a CSV


def _table(folder: Path, split: str, root: Path) -> Path | None:
    """The CSV that labels the files of a split."""
    candidates = (
        *(folder / "labels.csv", folder / f"{split}.csv"),
        *(root / f"{split}.csv", root / f"{split}_labels.csv", root / "labels.csv"),
    )
    if there := [path for path in candidates if path.is_file()]:
        return there[0]
    beside = sorted(path for path in folder.glob("*.csv") if path.is_file())
    return beside[0] if len(beside) == 1 else None


def _labelled(split: SplitName, folder: Path, table: Path) -> Layout:
    """The files of `folder` that the CSV `table` lists, a file and its label a line."""
    rows = [*_rows(table)]
    own, others = _spellings(folder, table.parent), _of_other_splits(folder, table.parent)
    at_file, at_label, has_header = _columns(table, rows[0][1], {*own, *others})
    labels: dict[Path, str] = {}
    elsewhere = 0
    for number, row in rows[has_header:]:
        where = f"{shown(table)} line {number}"
        if len(row) <= max(at_file, at_label) or not row[at_label]:
            raise UserError(f"{where}: no label in {shown(','.join(row)[:80])!r}")
        name, label = _plain(row[at_file]), row[at_label]
        if name in others and name not in own:
            elsewhere += 1
            continue
        if name in others and table.name == "labels.csv":
            raise UserError(
                f"{where}: {shown(name)} is an image of two folders: write {folder.name}/{name}"
            )
        if name not in own:
            raise UserError(
                f"{where}: no image {shown(name)!r} in {shown(folder)}; mend the line or add the "
                "file"
            )
        if shown(label) != label:
            raise UserError(f"{where}: the label {shown(label)} is no text")
        if labels.setdefault(own[name], label) != label:
            raise UserError(
                f"{where}: {shown(name)} is {label} here and {labels[own[name]]} before; one image "
                "has one label"
            )
    if not labels:
        raise UserError(f"{shown(table)} labels no image of {shown(folder)}")
    names = tuple(in_order({*labels.values()}))
    numbers = {name: label for label, name in enumerate(names)}
    files = [(path, numbers[labels[path]]) for path in sorted(labels)]
    files.sort(key=lambda item: item[1])
    columns = [shown(rows[0][1][at]) for at in (at_file, at_label)] if has_header else []
    in_columns = f", columns {' and '.join(columns)}" if columns else ""
    lines = [f"labels of {folder} are those of {table}{in_columns}"]
    lines += [f"{elsewhere} lines of {table} are not about {folder}"] if elsewhere else []
    lines += _left_out_line(folder, left_out(folder, [*labels, table]))
    return Layout(names, {split: files}, lines)


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV with their numbers; commas, semicolons or tabs between the values."""
    try:
        if table.stat().st_size > TABLE_BYTES:
            raise UserError(f"{shown(table)} is too large for a list of labels")
        text = table.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {shown(table)}: it is no text in UTF-8 (byte {error.start}); save it as "
            "CSV in UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown(table)}: {' '.join(str(error).split())}") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [
            (number, [value.strip() for value in row])
            for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
            if any(value.strip() for value in row)
        ]
    except csv.Error as error:
        raise UserError(f"cannot read {shown(table)}: {error}") from error
    if not rows or len(rows[0][1]) < 2:
        raise UserError(f"{shown(table)} has no two columns: write a file and its label a line")
    yield from rows


def _columns(table: Path, first: Sequence[str], images: Collection[str]) -> tuple[int, int, bool]:
    """Which columns have the file and the label, by the `first` line; whether that is a header."""
    if _plain(first[0]) in images or Path(first[0]).suffix.lower() in IMAGE_SUFFIXES:
        return 0, 1, False
    names = [re.sub(r"[\s-]+", "_", name.lower()) for name in first]
    file = next((names.index(name) for name in FILE_COLUMNS if name in names), 0)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    others = [at for at in range(len(names)) if at != file]
    if label is None and len(others) > 1:
        raise UserError(
            f"{shown(table)} has the columns {', '.join(map(shown, first))}: name the one of the "
            "labels label"
        )
    return file, others[0] if label is None else label, True


def _spellings(folder: Path, base: Path) -> dict[str, Path]:
    """The images of `folder` by all that a CSV in `base` may call them: with and without the
    ending, where that is not ambiguous, and with the folder before.
    """
    images = image_files(folder)
    stems = Counter(path.stem for path in images)
    names = {path.stem: path for path in images if stems[path.stem] == 1}
    names |= {path.name: path for path in images}
    before = {"", f"{folder.name}/", f"{folder}/"}
    if folder.is_relative_to(base) and folder != base:
        before.add(f"{folder.relative_to(base)}/")
    return {start + name: path for start in before for name, path in names.items()}


def _of_other_splits(folder: Path, base: Path) -> set[str]:
    """What a CSV in `base` may call images that are not those of `folder`, but of another split."""
    places = (base / split for split in ("train", "test", "val"))
    others = [place for place in places if place != folder and place.is_dir()]
    return {name for place in others for name in _spellings(place, base)}


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")
