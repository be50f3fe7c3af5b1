"""Bad calls in any number, each following from a seed and its number alone.

A bad call is that of a finished job with one thing wrong: a flag, a YAML file, one of the job's
files, a name. It may succeed, or say one line that names the culprit.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from scripts.faults import damage
from scripts.faults.calls import Call
from scripts.faults.jobs import TEMPORARY, Job
from utils.options import BufferOptions, DistillOptions, EvalOptions

OPTIONS = {"buffer.py": BufferOptions, "distill_att.py": DistillOptions, "eval.py": EvalOptions}
KINDS = ["flag"] * 3 + ["yaml"] * 2 + ["file"] * 4 + ["name"]
SECONDS = 15.0  # a call that is still at work by then has accepted its input
MEMORY = 4 * 2**30  # bytes that a call may take beyond what it begins with
MARKER = "ran"  # made where code in a file is run
# Flags with which a job has work to do that was not begun with other values, ...
NEW_WORK = {
    "buffer.py": ["--buffer_path", "new"],
    "distill_att.py": ["--run_name", "new"],
    "eval.py": ["--seed", "7"],
}
# ... and those with which it reads more of its files, which are the next.
MORE = {
    "buffer.py": [[], ["--num_experts", "4"]],
    "distill_att.py": [[], ["--Iteration", "3"], ["--load_all"], ["--skip_bad_buffers"]],
    "eval.py": [[], ["--seed", "1"], ["--full", "--model", "MLP"]],
}
FILES = {
    "buffer.py": "replay_buffer_0.pt replay_buffer_1.pt experts.json",
    "distill_att.py": "replay_buffer_0.pt checkpoint.pt checkpoint.pt metrics.jsonl config.yaml",
    "eval.py": "distilled_best.pt distilled_best.pt eval.json",
}
PATHS = {
    "buffer.py": "buffer_path data_path",
    "distill_att.py": "run_name save_path buffer_path config data_path",
    "eval.py": "distilled data_path",
}


@dataclass
class BadCall:
    """One wrong thing. `damage` is done to the folder of the job and says what it did; a message
    must hold one of the `culprits`.
    """

    kind: str
    script: str
    argv: list[str]
    culprits: tuple[str, ...]
    what: str
    damage: Callable[[Path], str | None] = lambda folder: None


@dataclass
class Verdict:
    """What was wrong with a call, and how it ended: "accepted", "refused", or what is a defect."""

    what: str
    ending: str
    stderr: str

    @property
    def is_defect(self) -> bool:
        return self.ending not in ("accepted", "refused")


def make_bad_call(seed: int, number: int, jobs: Sequence[Job]) -> BadCall:
    """Bad call `number`; `jobs` are the three finished ones, the last of which has all files."""
    rng = random.Random(f"{seed} {number}")
    make = {"flag": _flag, "yaml": _yaml, "file": _file, "name": _name}[rng.choice(KINDS)]
    return make(rng, jobs)


def _flag(rng: random.Random, jobs: Sequence[Job]) -> BadCall:
    """A command line with one bad flag, or one flag with a bad value."""
    job = rng.choice(jobs)
    field = rng.choice(fields(OPTIONS[job.script]))
    flag = f"--{field.name}"
    value = rng.choice([*damage.NUMBERS, *damage.WORDS, damage.misspelt(rng, str(field.default))])
    argv = list(job.argv)
    match rng.choice(["=", "=", "two words", "no value", "misspelt", "stray"]):
        case "=":
            bad = [f"{flag}={value}"]
        case "two words":
            bad = [flag, value]
        case "no value":
            bad = rng.choice([[flag], [flag, "1", "left-over"]])
        case "misspelt":
            others = [flag.upper(), flag[1:], flag[:-1], flag.replace("--", "—")]
            flag = rng.choice([damage.misspelt(rng, flag), *others])
            bad = rng.choice([[flag], [flag, value]])
        case _:
            flag = rng.choice([value, "stray", "--", "-x8", "@args", f"{flag} 5"])
            bad = [flag]
    argv = rng.choice([[*argv, *bad], [*argv, *bad], [*bad, *argv]])
    argv += rng.choice([[], NEW_WORK[job.script]])
    # What made numbers grow beyond all bounds cannot be told: there the remedy is named.
    culprits = (flag.strip("-=") or flag, field.name, *bad, value or "''", ": lower --")
    return BadCall("flag", job.script, argv, culprits, f"{bad!r:.80}")


def _yaml(rng: random.Random, jobs: Sequence[Job]) -> BadCall:
    """A bad configuration file."""
    name = rng.choice(fields(DistillOptions)).name
    junk = rng.choice([*damage.JUNK, *damage.NUMBERS, *damage.WORDS])
    whole = b"dataset: digits\nmodel: MLP\nipc: 1\nlr_img: 3\nlr_lr: 1.0e-7\nzca: false\n"
    generated = [
        yaml.safe_dump({name: junk}, allow_unicode=True).encode("utf-8", "replace"),
        f"{name}: {rng.choice(damage.NUMBERS)}\n".encode(),
        f"{damage.misspelt(rng, name)}: 1\n".encode("utf-8", "replace"),
        damage.damaged_bytes(rng, whole),
    ]
    text = rng.choice(generated if rng.random() < 0.4 else damage.YAML)
    (job,) = (job for job in jobs if job.script == "distill_att.py")
    argv, culprits = [*job.argv, "--config", "case.yaml"], ("case.yaml", name, "run_name")

    def write(folder: Path) -> None:
        (folder / "case.yaml").write_bytes(text)

    return BadCall("yaml", job.script, argv, culprits, f"a case.yaml of {text[:80]!r}", write)


def _file(rng: random.Random, jobs: Sequence[Job]) -> BadCall:
    """One of the files that a job reads is damaged or holds something else."""
    job = rng.choice(jobs)
    name = rng.choice(FILES[job.script].split())
    flags = rng.choice(MORE[job.script])
    (path,) = jobs[-1].reference.rglob(name)
    where = path.relative_to(jobs[-1].reference)
    culprits, what = (name, str(where.parent)), " ".join([*flags, name])

    def spoil(folder: Path) -> str:
        return damage.damage_file(rng, folder / where, MARKER)

    return BadCall("file", job.script, [*job.argv, *flags], culprits, what, spoil)


def _name(rng: random.Random, jobs: Sequence[Job]) -> BadCall:
    """A strange name for a file or folder."""
    job = rng.choice(jobs)
    flag, name = rng.choice(PATHS[job.script].split()), rng.choice(damage.NAMES)
    bad, culprits = f"--{flag}={name}", (name or "''", flag)
    argv = [*job.argv, bad]
    return BadCall("name", job.script, argv, culprits, f"{bad!r:.80}", damage.make_beside)


def try_bad_call(bad: BadCall, finished: Path, folder: Path) -> Verdict:
    """Make the call in a new `folder`, a copy of that of the finished jobs, gone afterwards."""
    shutil.copytree(finished, folder)
    done = bad.damage(folder)
    call = Call(bad.script, bad.argv, folder, memory=MEMORY)
    status = call.wait(SECONDS)
    if status is None:
        call.kill()
    ending = _judge(bad, status, call)
    if list(folder.rglob(MARKER)):
        ending = "its code was run"
    if status is not None and list(folder.rglob(TEMPORARY)):
        ending = "a temporary file is left"
    shutil.rmtree(folder)
    return Verdict(f"{bad.script}: {bad.what} {done or ''}".strip(), ending, call.stderr)


def _judge(bad: BadCall, status: int | None, call: Call) -> str:
    messages = call.messages
    if "Traceback" in call.stderr:
        return f"a traceback: {messages[-1]:.200}"
    if status in (None, 0):
        return "accepted"
    if status not in (1, 2) or len(messages) != 1:
        return f"status {status} with {len(messages)} lines"
    if not messages[0].startswith(f"{bad.script}: "):
        return f"a line that does not say who says it: {messages[0]:.200}"
    if not any(_names(messages[0], culprit) for culprit in bad.culprits):
        return f"nobody is named: {messages[0]:.300}"
    return "refused"


def _names(message: str, culprit: str) -> bool:
    """Whether a message holds a word, as it is, escaped, or with its white space as blanks."""
    printed = culprit.encode("utf-8", "backslashreplace").decode()
    spellings = [culprit, repr(culprit)[1:-1], " ".join(culprit.split()), printed]
    return any(spelling in message for spelling in spellings)
