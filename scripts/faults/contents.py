"""Read, write and compare what the files of a job hold."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

CIRCUMSTANCES = {"environment", "seconds"}  # keys that say when or with what a file was made
Contents = Mapping[str, Any]  # of a folder: the content of each file by its path, as text


def read_content(path: Path) -> Any:
    """Read a file whole, as its kind says; where it is not whole, the reader raises anything.

    Of a metrics.jsonl the last piece, text, may be a line that is cut off.
    """
    match path.suffix:
        case ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        case ".json":
            return json.loads(path.read_text("utf-8"))
        case ".jsonl":
            *lines, rest = path.read_text("utf-8").split("\n")
            return [*map(json.loads, lines), rest]
        case ".yaml":
            return yaml.safe_load(path.read_text("utf-8"))
        case ".png":
            Image.open(path).load()
    return path.read_bytes()


def write_content(content: Any, path: Path) -> None:
    """Write what `read_content` reads, or something else in its place."""
    match path.suffix:
        case ".pt":
            torch.save(content, path)
        case ".json":
            path.write_text(json.dumps(content))
        case ".jsonl":
            lines = content if isinstance(content, list) else [content]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines if line != ""))
        case _:
            path.write_text(yaml.safe_dump(content), "utf-8", "replace")


def read_folder(folder: Path) -> Contents:
    """Read all files but locks; of one that is not whole, the error stands for the content."""
    contents: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            name = str(path.relative_to(folder))
            try:
                contents[name] = read_content(path)
            except Exception as error:  # whatever a reader says of half a file
                contents[name] = error
    return contents


def broken(contents: Contents) -> list[str]:
    """List the files that are not whole."""
    errors = {name: held for name, held in contents.items() if isinstance(held, Exception)}
    return [f"{name} is not whole: {error!r:.200}" for name, error in errors.items()]


def lost(before: Contents, now: Contents, lasting: Collection[str]) -> list[str]:
    """List what the files `lasting` hold less of than before: experts, evaluations, or anything."""
    return [
        f"{name} holds {size} instead of {had}"
        for name in lasting
        if (size := _size(now, name)) < (had := _size(before, name))
    ]


def _size(contents: Contents, name: str) -> int:
    held = contents.get(name)
    if isinstance(held, list) and not name.endswith(".jsonl"):  # a log goes back to its checkpoint
        return len(held)
    return int(name in contents)


def differences(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Say where two nested contents differ in type or in any bit, apart from circumstances."""
    if type(ours) is type(theirs) and isinstance(ours, dict):
        for key in (ours | theirs).keys() - CIRCUMSTANCES:
            where = f"{place}[{key!r}]"
            if key not in theirs:
                yield f"{where} is there too"
            elif key not in ours:
                yield f"{where} is missing"
            else:
                yield from differences(ours[key], theirs[key], where)
    elif type(ours) is type(theirs) and isinstance(ours, list | tuple):
        one, other = (dict(enumerate(filter(_says_more, each))) for each in (ours, theirs))
        yield from differences(one, other, place)
    elif _bits(ours) != _bits(theirs):
        yield f"{place} is {ours!r:.80} instead of {theirs!r:.80}"


def _says_more(item: Any) -> bool:
    """Whether an item says more than the memory that a call held, which differs between calls."""
    return not (isinstance(item, dict) and item.get("kind") == "memory")


def _bits(value: Any) -> Any:
    """Describe a leaf by what must be equal in a copy of it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return type(value), value
