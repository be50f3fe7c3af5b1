"""Damaged files and bad values: one library for `python -m scripts.faults` and for the tests.

What is drawn comes from a `random.Random` that the caller hands in, so a case follows from its seed
and hypothesis can shrink it.
"""

import codecs
import io
import json
import math
import os
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

# Of flags: numbers that are none or beyond bounds, and words.
NUMBERS = (
    "nan inf -inf 1e999 -1 0 -0 1e6 1e30 1e300 1e-300 2.5 0.1 99999999999999999999999 1_0 "
    "0x10 1e1000 1,5 +5 ٣ ５ ² ½ 1e-400 -1e-5 --5 5- 1/2 2**3 True none auto"
).split()
WORDS = ["", " ", "\n", "3\n4", "\t", "\x1b[31m", "\udcff", "a" * 5000]
WORDS += "' \" é 💥 %s %(x)s {} {0} $(id) `id` ../.. - -- -5 = a=b \\ @x".split()
# Of files and folders. Those of BESIDE are made by `make_beside`.
BESIDE = ["a_file", "a_file/x", "loop", "dangling"]
NAMES = ["", "with space", "new\nline", "not-utf8-\udcff\udcfe", "\x1b[2J", "\x7f", *BESIDE]
NAMES += ["x" * 255, "x" * 256, "x" * 5000, "d/" * 2000]
NAMES += 'it\'s "quoted" . .. / ~ ~nobody-here/x a/../../b é💥 a:b*?<>| -x %s{}$(id) - '.split()
NAMES += "trailing/ config.yaml /dev/null /dev/full /proc/self/x".split()
# Configurations that must be refused: that run code, circles, what is beyond all bounds, and nine
# lists of nine of the one before, a billion words.
_BOMB = "".join(f"b{n}: &a{n + 1} [{f'*a{n},' * 9}]\n" for n in range(9))
HOSTILE_YAML = [
    b"ipc: !!python/object/apply:os.mkdir [ran]",
    b"!!python/object/apply:os.mkdir [ran]",
    b"ipc: !!python/name:os.system",
    b"a: &a [*a]",
    b"ipc: &a [*a]",
    f"ipc: {'9' * 5000}".encode(),
    f"ipc: 0x{'f' * 5000}".encode(),
    f"ipc: {'x' * 5000}".encode(),
    f"{'k' * 5000}: 1".encode(),
    b"{a: " * 20_000,
    b"- " * 20_000,
    f"a: {'[' * 5000}{']' * 5000}".encode(),
    "".join(f"{'  ' * n}a:\n" for n in range(2_000)).encode(),
    f"a: &a0 x\n{_BOMB}".encode(),
]
# Others that are odd or wrong, one a line ...
_LINES = r"""
# nothing
- a
just words
42
null
ipc: [
ipc: {a: 1}
ipc: [1, 2]
ipc: *nowhere
ipc: 1: 2
ipc: !!binary aGVsbG8=
ipc: !!set {a, b}
ipc: !unknown x
? [1, 2]\n: 3
? {a: 1}\n: 3
? *a\n: 3
1: 2
null: 2
1.5: 2
true: 2
2001-01-01: 2
ipc: 2001-01-01
ipc: 2001-01-01 10:00:00
ipc: 2001-99-99
ipc: 1e999
ipc: .inf
lr_img: .nan
ipc: 0b11
ipc: 1:30
ipc: 010
dsa: yes
dsa: 2
dsa: [yes]
compile: on
compile: ~
zca: 'off'
model: yes
run_name: 5
run_name: [a]
run_name: ''
config: other.yaml
environment: 5
environment: []\nipc: x
<<: {ipc: 1}
<<: 5
--- 1\n--- 2
ipc: 1\n---\nipc: 2
%YAML 9.9\n---\nipc: 1
%TAG ! x\n---\nipc: 1
ipc: 'open
ipc: "\x"
ipc: |\n  1
ipc: >-
ipc: 1 # é💥
ïpc: 1
ipc : 1
ipc:1
{ipc: 1, lr_img: }
ipc: 1\nipc: 2
iterations: 2\nIteration: 3
\tipc: 1
ipc:\t1
ipc: 1\n\tlr_img: 2
"""
YAML = [line.replace(r"\n", "\n").replace(r"\t", "\t").encode() for line in _LINES.split("\n")]
# ... and in other encodings, or in none.
YAML += [b"\xff\xfe\x00i", b"\x80\x81\x82", b"ipc: \xff", b"ipc: 1\x00", b"\x00" * 100]
YAML += [b"\x1b[31m: 1", b"ipc: \xc2\x85", b"ipc: \xed\xa0\x80", b"ipc: 1\r\nseed: 0\r\n"]
YAML += [codecs.BOM_UTF8 + b"ipc: 1", codecs.BOM_UTF16_LE + b"i", "ipc: 1".encode("utf-32")]
YAML += HOSTILE_YAML
# For a part of what a file holds.
GONE = "gone"  # leave it out
JUNK: list[Any] = [GONE, None, True, -1, 0, 3, 2**70, 1.5, math.nan, math.inf]
JUNK += ["", "x", "../../x", "x" * 5000, "\n", "\ud800"]
JUNK += [[], [1], ["x", None], {}, {"a": 1}, {"x": {"y": [{}]}}, [[[[]]]]]
TENSORS = [torch.zeros(0), torch.tensor(1.0), torch.zeros(3), torch.full((10,), 99)]
TENSORS += [torch.zeros(10, channels, 8, 8) for channels in (1, 3)]
TENSORS += [torch.full((10, 1, 8, 8), math.nan), torch.zeros(5, 1, 8, 8, dtype=torch.float64)]
TENSORS += [torch.zeros(4, dtype=kind) for kind in (torch.int64, torch.bool, torch.complex64)]


def misspelt(rng: random.Random, word: str) -> str:
    """A word with a letter gone, doubled or put in, or cut in two that change places."""
    at = rng.randrange(max(1, len(word)))
    head, letter, tail = word[:at], word[at : at + 1], word[at + 1 :]
    inserted = rng.choice("xé_ =\n")
    return rng.choice([head + tail, head + 2 * letter + tail, head + inserted + tail, tail + head])


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` cut off, with bits flipped, bytes zeroed, put in or taken out, or random bytes."""
    place = rng.randrange(max(1, len(content)))
    length = rng.choice([1, 2, 4, 8, 12, 16, 40, 100, 1000])
    before, after = content[:place], content[place:]
    match rng.choice(["cut", "flip", "flips", "zero", "insert", "remove", "overwrite", "random"]):
        case "cut":
            return before
        case "flip":
            return flipped(content, place, rng.randrange(8)) if content else b""
        case "flips":
            for _ in range(rng.choice([2, 3, 30]) if content else 0):
                content = flipped(content, rng.randrange(len(content)), rng.randrange(8))
            return content
        case "zero":
            return before + bytes(min(length, len(after))) + after[length:]
        case "insert":
            return before + rng.randbytes(length) + after
        case "remove":
            return before + after[length:]
        case "overwrite":
            return before + rng.randbytes(length) + after[length:]
        case _:
            return rng.choice([b"", b"PK\x03\x04", b"{", b"[", b"\x80\x02"]) + rng.randbytes(length)


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """`content` with one bit of its byte `place` flipped."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def torch_bytes(content: object, *, old_format: bool = False) -> bytes:
    """What `torch.save` writes, today or before PyTorch 1.6 (`old_format`, without checksums)."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    return file.getvalue()


class Trap:
    """Unpickled by code that trusts the file, it makes the folder `marker`."""

    def __init__(self, marker: str | Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._marker,)


def trapped(marker: str | Path) -> dict[str, bytes]:
    """Files that run code in whoever trusts them: it makes the folder `marker`."""
    content = [[Trap(marker)]]
    return {
        "a pickle": pickle.dumps(content, protocol=2),
        "a torch file": torch_bytes(content),
        "an old torch file": torch_bytes(content, old_format=True),
    }


def _bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's name has 107 bytes at most


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": _bind_socket,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


def replace_by(kind: str, path: Path) -> None:
    """Put one of NO_FILES in the place of a file."""
    path.unlink(missing_ok=True)
    NO_FILES[kind](path)


def make_beside(folder: Path) -> None:
    """Make the files that NAMES speak of."""
    (folder / "a_file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")


def read_content(path: Path) -> Any:
    """What a file holds; an exception if it is not whole.

    Of a metrics.jsonl the last piece, text, may be a line that is cut off.
    """
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    if path.suffix == ".jsonl":
        *lines, rest = path.read_text("utf-8").split("\n")
        return [*map(json.loads, lines), rest]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text("utf-8"))
    return path.read_bytes()


def write_content(content: Any, path: Path) -> None:
    """Write what `read_content` reads, or something else in its place."""
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".jsonl":
        lines = content if isinstance(content, list) else [content]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line != ""))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(yaml.safe_dump(content), "utf-8", "replace")


def replace_part(rng: random.Random, content: Any, junk: Any) -> tuple[Any, str]:
    """A copy of nested containers with one part, at a random depth, replaced by junk; where."""
    if not isinstance(content, dict | list) or not content:
        return junk, ""
    keys: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = rng.choice(keys)
    copy = content.copy()
    if rng.random() < 0.6 and isinstance(content[key], dict | list) and content[key]:
        copy[key], where = replace_part(rng, content[key], junk)
        return copy, f"[{key!r}]{where}"
    if junk is GONE:
        del copy[key]
    else:
        copy[key] = junk
    return copy, f"[{key!r}]"


def damage_file(rng: random.Random, path: Path, marker: str | Path) -> str:
    """Damage a file in one of many ways; what was done, in words.

    It is `marker` that is made if code in the file is run.
    """
    how = rng.choice(["bytes"] * 3 + ["no file", "other file", "code", "content", "content"])
    if how == "no file":
        kind = rng.choice(["missing", "a folder", "a link to itself", "a link to nowhere"])
        path.unlink()
        NO_FILES.get(kind, lambda path: None)(path)
        return f"is {kind}"
    if how == "other file":
        others = [p for p in path.parents[1].rglob("*") if p.suffix == path.suffix and p.is_file()]
        other = rng.choice(sorted(others))
        path.write_bytes(other.read_bytes())
        return f"is {other.name}"
    if how == "code":
        kind, content = rng.choice(list(trapped(marker).items()))
        path.write_bytes(content)
        return f"is {kind} that runs code"
    if how == "content":
        junk = rng.choice(JUNK + (TENSORS if path.suffix == ".pt" else []))
        whole = rng.random() < 0.15
        content, where = (junk, "") if whole else replace_part(rng, read_content(path), junk)
        write_content(content, path)
        said = f"a tensor {list(junk.shape)}" if isinstance(junk, torch.Tensor) else f"{junk!r:.40}"
        return f"with {where or 'all of it'} {'gone' if junk is GONE else f'as {said}'}"
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return "with damaged bytes"
