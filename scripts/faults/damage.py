"""Damaged files and bad values: one library for `python -m scripts.faults` and for the tests.

What is drawn comes from a `random.Random` that the caller hands in, so a case follows from its seed
and hypothesis can shrink it.
"""

import codecs
import io
import math
import os
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.faults.contents import read_content, write_content

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
# Others that are odd or wrong: a value, a key, ...
_VALUES = r"""
[ | *nowhere | 1: 2 | !!binary aGVsbG8= | !!set {a, b} | !unknown x | 2001-01-01 10:00:00 |
2001-99-99 | 1e999 | 0b11 | 1:30 | 010 | 'open | "\x" | >- | 1 # é💥
"""
_KEYS = "1 | null | 1.5 | true | 2001-01-01 | <<"
# ... or any lines, ...
_LINES = r"""
# nothing
- a
just words
42
null
? [1, 2]\n: 3
? {a: 1}\n: 3
? *a\n: 3
lr_img: .nan
dsa: yes
dsa: [yes]
compile: on
compile: ~
zca: 'off'
model: yes
run_name: ''
config: other.yaml
environment: []\nipc: x
<<: {ipc: 1}
--- 1\n--- 2
ipc: 1\n---\nipc: 2
%YAML 9.9\n---\nipc: 1
%TAG ! x\n---\nipc: 1
ipc: |\n  1
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
YAML = [f"ipc: {value.strip()}".encode() for value in _VALUES.split(" |")]
YAML += [f"{key}: 2".encode() for key in _KEYS.split(" | ")]
YAML += [line.replace(r"\n", "\n").replace(r"\t", "\t").encode() for line in _LINES.split("\n")]
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
    """`content` with bits flipped or with a piece left out, zeroed or put in; or random bytes."""
    place = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 4, 8, 12, 16, 40, 100, 1000])
    match rng.choice(["flip", "flip", "replace", "replace", "replace", "random"]):
        case "flip":
            for _ in range(rng.choice([1, 1, 2, 3, 30]) if content else 0):
                content = flipped(content, rng.randrange(len(content)), rng.randrange(8))
            return content
        case "replace":
            end = place + rng.choice([0, length, len(content)])
            piece = rng.choice([b"", bytes(length), rng.randbytes(length)])
            return content[:place] + piece + content[end:]
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
    match rng.choice(["bytes"] * 3 + ["no file", "other file", "code", "content", "content"]):
        case "bytes":
            path.write_bytes(damaged_bytes(rng, path.read_bytes()))
            return "with damaged bytes"
        case "no file":
            kind = rng.choice(["missing", "a folder", "a link to itself", "a link to nowhere"])
            path.unlink()
            NO_FILES.get(kind, lambda path: None)(path)
            return f"is {kind}"
        case "other file":
            beside = path.parents[1].rglob(f"*{path.suffix}")
            other = rng.choice(sorted(other for other in beside if other.is_file()))
            path.write_bytes(other.read_bytes())
            return f"is {other.name}"
        case "code":
            kind, content = rng.choice(list(trapped(marker).items()))
            path.write_bytes(content)
            return f"is {kind} that runs code"
        case _:
            junk = rng.choice(JUNK + (TENSORS if path.suffix == ".pt" else []))
            where, content = "", junk
            if rng.random() < 0.85:
                content, where = replace_part(rng, read_content(path), junk)
            write_content(content, path)
            return f"with {where or 'all of it'} as {junk!r:.40}"
