"""Bad command lines and files in any number, each following from a seed and its number alone.

A case is a finished job of `fault_jobs` with one thing wrong: a flag, a YAML file, one of the job's
files, a name. It may succeed, or say one line that names the culprit.
"""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from scripts.faults.bad_values import (
    GONE,
    JUNK,
    NAMES,
    NOT_WORDS,
    NUMBERS,
    TENSORS,
    WORDS,
    YAML_BYTES,
    YAML_TEXTS,
)
from scripts.faults.calls import Call
from scripts.faults.jobs import Job, is_temporary
from utils.options import BufferOptions, DistillOptions, EvalOptions

OPTIONS = {"buffer.py": BufferOptions, "distill_att.py": DistillOptions, "eval.py": EvalOptions}
KINDS = ("flag", "flag", "flag", "yaml", "yaml", "file", "file", "file", "file", "name")
SECONDS = 15.0  # a call that is still at work then has taken its input for good
MEMORY = 4 * 2**30  # that a call may take beyond what it begins with
TRAP = "ran"  # the file that a pickle makes whose code is run


@dataclass
class Case:
    """One wrong thing. `damage` is done to the folder of the job; a message must hold one of the
    `culprits`.
    """

    kind: str
    script: str
    argv: list[str]
    culprits: tuple[str, ...]
    what: str
    damage: Callable[[Path], object] = lambda folder: None

    def __str__(self) -> str:
        return f"{self.script}: {self.what}"


class _Trap:
    """Unpickled, it would make the file TRAP."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {TRAP}",))


def make_case(seed: int, number: int, jobs: Sequence[Job]) -> Case:
    """Case `number`; `jobs` are the three finished ones, the last of which has all files."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(KINDS)
    return {"flag": _flag, "yaml": _yaml, "file": _file, "name": _name}[kind](rng, jobs)


_ANEW = {
    "buffer.py": ["--buffer_path", "new"],
    "distill_att.py": ["--run_name", "new"],
    "eval.py": ["--seed", "7"],
}


def _flag(rng: random.Random, jobs: Sequence[Job]) -> Case:
    """A command line with one bad flag, or one flag with a bad value."""
    job = rng.choice(jobs)
    field = rng.choice(fields(OPTIONS[job.script]))
    flag = f"--{field.name}"
    value = rng.choice([*NUMBERS, *NOT_WORDS, *WORDS, _garble(rng, str(field.default))])
    form = rng.randrange(10)
    if form < 4:
        bad = [f"{flag}={value}"]
    elif form < 7:
        bad = [flag, value]
    elif form == 7:
        bad = [flag] if rng.random() < 0.5 else [flag, "1", "left-over"]
    elif form == 8:
        wrong = [_garble(rng, flag), flag.upper(), flag[1:], flag[:-1], flag.replace("--", "—")]
        flag = rng.choice(wrong)
        bad = [flag, *([value] if rng.random() < 0.5 else [])]
    else:
        flag = rng.choice([value, "stray", "--", "-x8", "@args", flag + " 5"])
        bad = [flag]
    at = rng.choice([0, len(job.argv)]) if form == 9 else len(job.argv)
    argv = [*job.argv[:at], *bad, *job.argv[at:]]
    if rng.random() < 0.5:  # where nothing has been begun with another value
        argv += _ANEW[job.script]
    # What made numbers grow beyond all bounds cannot be told: there the remedy is named.
    culprits = (flag.strip("-=") or flag, field.name, *bad, value or "''", ": lower --")
    return Case("flag", job.script, argv, culprits, f"{bad!r:.80}")


def _yaml(rng: random.Random, jobs: Sequence[Job]) -> Case:
    """A configuration file that is no good."""
    job = next(job for job in jobs if job.script == "distill_att.py")
    field = rng.choice(fields(DistillOptions))
    junk = rng.choice([*JUNK, *NUMBERS, *WORDS])
    generated = [
        yaml.safe_dump({field.name: junk}, allow_unicode=True).encode("utf-8", "replace"),
        f"{field.name}: {rng.choice([*NUMBERS, *WORDS])}\n".encode(),
        f"{_garble(rng, field.name)}: 1\n".encode("utf-8", "replace"),
        rng.randbytes(rng.randrange(200)),
        _flip(rng, b"dataset: digits\nmodel: MLP\nipc: 1\nlr_img: 3\nlr_lr: 1.0e-7\nzca: false\n"),
    ]
    if rng.random() < 0.4:
        text = rng.choice(generated)
    else:
        text = rng.choice([text.encode() for text in YAML_TEXTS] + YAML_BYTES)
    argv = [*job.argv, "--config", "case.yaml"]
    return Case(
        "yaml",
        job.script,
        argv,
        ("case.yaml", field.name, "run_name"),
        f"a case.yaml of {text[:80]!r}",
        lambda folder: (folder / "case.yaml").write_bytes(text),
    )


def _file(rng: random.Random, jobs: Sequence[Job]) -> Case:
    """One of the files that a job reads is damaged or holds something else."""
    job = rng.choice(jobs)
    names = {
        "buffer.py": ["replay_buffer_0.pt", "replay_buffer_1.pt", "experts.json"],
        "distill_att.py": [
            "replay_buffer_0.pt",
            "checkpoint.pt",
            "checkpoint.pt",
            "metrics.jsonl",
            "config.yaml",
        ],
        "eval.py": ["distilled_best.pt", "distilled_best.pt", "eval.json"],
    }
    name = rng.choice(names[job.script])
    (path,) = jobs[-1].reference.rglob(name)
    where = path.relative_to(jobs[-1].reference)
    what, damage = rng.choice(_DAMAGES)(rng, path)
    more = {
        # Where there is nothing left to do a file is hardly looked at.
        "buffer.py": [[], ["--num_experts", "4"]],
        "distill_att.py": [[], ["--Iteration", "3"], ["--load_all"], ["--skip_bad_buffers"]],
        "eval.py": [[], ["--seed", "1"], ["--full", "--model", "MLP"]],
    }
    flags = rng.choice(more[job.script])
    return Case(
        "file",
        job.script,
        [*job.argv, *flags],
        (name, str(where.parent)),
        f"{' '.join(flags)} {name} {what}",
        lambda folder: damage(folder / where),
    )


def _name(rng: random.Random, jobs: Sequence[Job]) -> Case:
    """A strange name for a file or folder."""
    job = rng.choice(jobs)
    flags = {
        "buffer.py": ["--buffer_path", "--data_path"],
        "distill_att.py": ["--run_name", "--save_path", "--buffer_path", "--config", "--data_path"],
        "eval.py": ["--distilled", "--data_path"],
    }
    flag, name = rng.choice(flags[job.script]), rng.choice(NAMES)

    def prepare(folder: Path) -> None:
        (folder / "a_file").write_text("x")
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("nowhere")

    bad = f"{flag}={name}"
    argv, culprits = [*job.argv, bad], (name or "''", flag[2:])
    return Case("name", job.script, argv, culprits, f"{bad!r:.80}", prepare)


def _garble(rng: random.Random, word: str) -> str:
    """A word with one letter gone, doubled, changed, or two of them swapped."""
    at = rng.randrange(max(1, len(word)))
    head, letter, tail = word[:at], word[at : at + 1], word[at + 1 :]
    return rng.choice(
        [head + tail, head + 2 * letter + tail, head + rng.choice("xé_ =\n") + tail, tail + head]
    )


Damage = tuple[str, Callable[[Path], object]]


def _truncated(rng: random.Random, path: Path) -> Damage:
    size = int(path.stat().st_size * rng.choice([0, 0.01, 0.3, 0.5, 0.9, 0.999]))
    return f"cut to {size} bytes", lambda there: os.truncate(there, size)


def _flipped(rng: random.Random, path: Path) -> Damage:
    data = _flip(rng, path.read_bytes())
    return "with flipped bytes", lambda there: there.write_bytes(data)


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _random_bytes(rng: random.Random, path: Path) -> Damage:
    data = rng.choice([b"", b"PK\x03\x04", b"{", b"[", b"\x80\x02"]) + rng.randbytes(
        rng.choice([0, 1, 50, 5000])
    )
    return f"of random bytes {data[:10]!r}", lambda there: there.write_bytes(data)


def _no_file(rng: random.Random, path: Path) -> Damage:
    """Something else than a file, or none."""

    def replace(there: Path) -> None:
        there.unlink()
        if kind == "a folder":
            there.mkdir()
        elif kind != "missing":
            there.symlink_to(there.name if kind == "a link to itself" else "nowhere")

    kind = rng.choice(["a folder", "a link to itself", "a link to nowhere", "missing"])
    return f"is {kind}", replace


def _other_file(rng: random.Random, path: Path) -> Damage:
    """Another file of the job under this name."""
    others = [p for p in path.parents[1].rglob("*") if p.is_file() and not is_temporary(p)]
    other = rng.choice([p for p in sorted(others) if p.suffix == path.suffix] or sorted(others))
    data = other.read_bytes()
    return f"is {other.name}", lambda there: there.write_bytes(data)


def _trap(rng: random.Random, path: Path) -> Damage:
    """A pickle that runs code, bare or in torch's format."""
    payload = rng.choice([_Trap(), [[_Trap()]], {"state": _Trap(), "config": {}}])
    if rng.random() < 0.5:
        return "a pickle that runs code", lambda there: there.write_bytes(pickle.dumps(payload))
    old = rng.random() < 0.5
    return "a torch file that runs code", lambda there: torch.save(
        payload, there, _use_new_zipfile_serialization=not old
    )


def _other_content(rng: random.Random, path: Path) -> Damage:
    """Well-formed, but not what it should hold: one part of it is something else, or all of it."""
    junk = rng.choice(JUNK + (TENSORS if path.suffix == ".pt" else []))
    whole = rng.random() < 0.15
    reader: dict[str, Callable[[Path], Any]] = {
        ".pt": lambda p: torch.load(p, weights_only=True),
        ".json": lambda p: json.loads(p.read_text()),
        ".jsonl": lambda p: [json.loads(line) for line in p.read_text().splitlines()],
        ".yaml": lambda p: yaml.safe_load(p.read_text()),
    }
    value = reader[path.suffix](path)
    where = "all of it"
    if whole:
        value = junk
    else:
        value, where = _replace_part(rng, value, junk)

    def write(there: Path) -> None:
        if there.suffix == ".pt":
            torch.save(value, there)
        elif there.suffix == ".jsonl":
            lines = value if isinstance(value, list) else [value]
            there.write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif there.suffix == ".json":
            there.write_text(json.dumps(value))
        else:
            there.write_text(yaml.safe_dump(value), "utf-8", "replace")

    said = f"{junk!r:.40}" if not isinstance(junk, torch.Tensor) else f"a tensor {junk.shape}"
    return f"with {where} {'gone' if junk is GONE else f'as {said}'}", write


def _replace_part(rng: random.Random, value: Any, junk: Any) -> tuple[Any, str]:
    """A copy of nested containers with one part, at a random depth, replaced by junk."""
    if isinstance(value, dict | list) and value:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        copy = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.6 and isinstance(value[key], dict | list) and value[key]:
            copy[key], where = _replace_part(rng, value[key], junk)
            return copy, f"[{key!r}]{where}"
        if junk is GONE:
            del copy[key]
        else:
            copy[key] = junk
        return copy, f"[{key!r}]"
    return junk, ""


_DAMAGES: list[Callable[[random.Random, Path], Damage]] = [
    _truncated,
    _flipped,
    _random_bytes,
    _no_file,
    _other_file,
    _trap,
    _other_content,
    _other_content,
]


@dataclass
class Verdict:
    """How a case ended: "accepted", "refused", or what was wrong."""

    ending: str
    stderr: str

    @property
    def is_wrong(self) -> bool:
        return self.ending not in ("accepted", "refused")


def try_case(case: Case, finished: Path, folder: Path) -> Verdict:
    """Run a case in a new `folder`, a copy of that of the finished jobs, gone afterwards."""
    shutil.copytree(finished, folder)
    case.damage(folder)
    call = Call(case.script, case.argv, folder, memory=MEMORY)
    status = call.wait(SECONDS)
    if status is None:
        call.kill()
    ending = _judge(case, status, call)
    if list(folder.rglob(TRAP)):
        ending = "its code was run"
    if status is not None and list(folder.rglob(".*.tmp")):
        ending = "a temporary file is left"
    shutil.rmtree(folder)
    return Verdict(ending, call.stderr)


def _judge(case: Case, status: int | None, call: Call) -> str:
    messages = call.messages
    if "Traceback" in call.stderr:
        return f"a traceback: {messages[-1]:.200}"
    if status in (None, 0):
        return "accepted"
    if status not in (1, 2) or len(messages) != 1:
        return f"status {status} with {len(messages)} lines"
    if not messages[0].startswith(f"{case.script}: "):
        return f"a line that does not say who says it: {messages[0]:.200}"
    if not any(_named(culprit, messages[0]) for culprit in case.culprits):
        return f"nobody is named: {messages[0]:.300}"
    return "refused"


def _named(culprit: str, message: str) -> bool:
    """Whether a message holds a name, as it is, escaped, or with its white space as blanks."""
    spellings = [culprit, repr(culprit)[1:-1], " ".join(culprit.split())]
    printed = culprit.encode("utf-8", "backslashreplace").decode()
    return any(spelling in message for spelling in [*spellings, printed])
