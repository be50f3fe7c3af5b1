"""Bad calls in any number, each following from a seed and its number alone.

A bad call is that of a finished job with one thing wrong: a flag, a YAML file, one of the job's
files, a name. It may succeed, or say one line that names the culprit.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from scripts.faults import damage
from scripts.faults.calls import Call
from scripts.faults.jobs import TEMPORARY, Job, copied
from scripts.faults.strikes import Strikes
from utils.options import BufferOptions, DistillOptions, EvalOptions

KINDS = ["flag"] * 3 + ["yaml"] * 2 + ["file"] * 4 + ["name"]
SECONDS = 15.0  # a call that is still at work by then has accepted its input
MEMORY = 4 * 2**30  # bytes that a call may take beyond what it begins with
MARKER = "ran"  # made where code in a file is run
OPTIONS = {"buffer.py": BufferOptions, "distill_att.py": DistillOptions, "eval.py": EvalOptions}
# Flags with which a job has work to do that was not begun with other values, ...
NEW_WORK = {
    "buffer.py": "--buffer_path new",
    "distill_att.py": "--run_name new",
    "eval.py": "--seed 7",
}
# ... and those with which it reads more of its files, which are the next.
MORE = {
    "buffer.py": ["", "--num_experts 4"],
    "distill_att.py": ["", "--Iteration 3", "--load_all", "--skip_bad_buffers"],
    "eval.py": ["", "--seed 1", "--full --model MLP"],
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
    """What was done, and the command line, of which a message must hold one of the `culprits`."""

    what: str
    argv: list[str]
    culprits: tuple[str, ...]


def draw_kind(seed: int, number: int, jobs: Sequence[Job]) -> tuple[str, Job, random.Random]:
    """Draw the kind of bad call `number` and its job, of the three; with what draws the rest."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(KINDS)
    if kind == "yaml":
        jobs = [job for job in jobs if job.script == "distill_att.py"]
    return kind, rng.choice(jobs), rng


def try_bad_call(seed: int, number: int, jobs: Sequence[Job], *, show: bool = False) -> Strikes:
    """Make bad call `number` in a copy of the folder of the last of the three jobs.

    With `show` print what was done and how it ended.
    """
    kind, job, rng = draw_kind(seed, number, jobs)
    with copied(jobs[-1].reference) as folder:
        bad = {"flag": _flag, "yaml": _yaml, "file": _file, "name": _name}[kind](rng, job, folder)
        call = Call(job.script, bad.argv, folder, memory=MEMORY)
        status = call.wait(SECONDS)
        if status is None:
            call.kill()
        defect = _defect(status, call, bad.culprits)
        if list(folder.rglob(MARKER)):
            defect = "its code was run"
        if status is not None and list(folder.rglob(TEMPORARY)):
            defect = "a temporary file is left"
    if show:
        print(f"{job.script}: {bad.what}\n{bad.argv}\nstatus {status}\n{call.stderr}")
    yield [f"case {number}: {job.script}: {bad.what}: {defect}"] if defect else []


def _flag(rng: random.Random, job: Job, folder: Path) -> BadCall:
    """A command line with one bad flag, or one flag with a bad value."""
    field = rng.choice(fields(OPTIONS[job.script]))
    flag = f"--{field.name}"
    value = rng.choice([*damage.NUMBERS, *damage.WORDS, damage.misspelt(rng, str(field.default))])
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
    argv = rng.choice([[*job.argv, *bad], [*job.argv, *bad], [*bad, *job.argv]])
    argv += rng.choice(["", NEW_WORK[job.script]]).split()
    # What made numbers grow beyond all bounds cannot be told: there the remedy is named.
    culprits = (flag.strip("-=") or flag, field.name, *bad, value or "''", ": lower --")
    return BadCall(f"{bad!r:.80}", argv, culprits)


def _yaml(rng: random.Random, job: Job, folder: Path) -> BadCall:
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
    (folder / "case.yaml").write_bytes(text)
    argv, culprits = [*job.argv, "--config", "case.yaml"], ("case.yaml", name, "run_name")
    return BadCall(f"a case.yaml of {text[:80]!r}", argv, culprits)


def _file(rng: random.Random, job: Job, folder: Path) -> BadCall:
    """One of the files that a job reads is damaged or holds something else."""
    name = rng.choice(FILES[job.script].split())
    flags = rng.choice(MORE[job.script])
    (path,) = folder.rglob(name)
    done = damage.damage_file(rng, path, MARKER)
    culprits = (name, str(path.parent.relative_to(folder)))
    return BadCall(f"{flags} {name} {done}", [*job.argv, *flags.split()], culprits)


def _name(rng: random.Random, job: Job, folder: Path) -> BadCall:
    """A strange name for a file or folder."""
    flag, name = rng.choice(PATHS[job.script].split()), rng.choice(damage.NAMES)
    bad = f"--{flag}={name}"
    damage.make_beside(folder)
    return BadCall(f"{bad!r:.80}", [*job.argv, bad], (name or "''", flag))


def _defect(status: int | None, call: Call, culprits: Sequence[str]) -> str:
    """What is wrong with how a call ended; "" if it accepted its input or refused it well."""
    messages = call.messages
    if "Traceback" in call.stderr:
        return f"a traceback: {messages[-1]:.200}"
    if status in (None, 0):
        return ""
    if status not in (1, 2) or len(messages) != 1:
        return f"status {status} with {len(messages)} lines"
    if not messages[0].startswith(f"{call.script}: "):
        return f"a line that does not say who says it: {messages[0]:.200}"
    if not any(_names(messages[0], culprit) for culprit in culprits):
        return f"nobody is named: {messages[0]:.300}"
    return ""


def _names(message: str, culprit: str) -> bool:
    """Whether a message holds a word, as it is, escaped, or with its white space as blanks."""
    printed = culprit.encode("utf-8", "backslashreplace").decode()
    spellings = [culprit, repr(culprit)[1:-1], " ".join(culprit.split()), printed]
    return any(spelling in message for spelling in spellings)
