"""How the three scripts take kills, full disks, signals and bad input, counted.

    python -m scripts.faults all                         # the figures of docs/reliability.md
    python -m scripts.faults kills --kills 200           # SIGKILL at random moments
    python -m scripts.faults bad_input --count 1000      # command lines and files
    python -m scripts.faults bad_input --first 17 --count 1    # one case, with what it says
    python -m scripts.faults table docs/reliability.md   # the table anew, from what was counted

Small jobs on digits, in a temporary folder; nothing is needed but the packages. A fault strikes,
the files are looked at, the job goes on and must end as it does undisturbed, bit for bit. Prints a
line for each fault, adds to the JSON file --out, with hardware, versions and command, and ends with
status 1 where anything was lost, different or not said in one line. Where a fault strikes follows
from --seed, as far as timing allows.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.faults.bad_calls import draw_kind, try_bad_call
from scripts.faults.calls import ROOT
from scripts.faults.jobs import LONGER, TINY, make_jobs
from scripts.faults.strikes import Strikes, at_writes, kills, second_call, side_by_side, signals
from utils.compute.device import default_device
from utils.core.files import write_text
from utils.core.provenance import describe_environment

KINDS = ["kills", "writes", "full_disk", "signals", "two", "bad_input"]
KILLS_A_TURN = 12  # of one of the jobs that are killed side by side
MARKS = ("<!-- faults -->\n", "<!-- end -->\n")
CONTINUED = "continued: nothing lost, the same files bit for bit"
# The rows of the table, and what has to happen.
EXPECTED = {
    "SIGKILL at a random moment": CONTINUED,
    "SIGKILL before a file is opened": CONTINUED,
    "SIGKILL before a file is renamed": CONTINUED,
    "disk full from a file on": "one line, status 2, files whole; with room again the same files "
    "bit for bit",
    "SIGINT or SIGTERM": "one line with the command that continues, 130 or 143; it does: the same",
    "second call of one job": "refused in one line, status 2; the first untouched",
    "two calls side by side": "both end; together the same files bit for bit",
    "bad file": "one line that names it, or not needed",
    "bad flag": "one line that names it, or a valid call",
    "bad name": "one line that names it, or a valid call",
    "bad yaml": "one line that names it, or a valid call",
}
Task = tuple[str, str, Strikes]  # a fault of EXPECTED, a script, and strikes yet to be made


def tasks(kind: str, args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """List the strikes of one kind, which can be made side by side."""
    jobs = make_jobs(scratch, LONGER if kind in ("kills", "signals") else TINY)
    if kind == "kills":
        for turn, first in enumerate(range(0, args.kills, KILLS_A_TURN)):
            for k, job in enumerate(jobs):
                share = (min(KILLS_A_TURN, args.kills - first) + k) // len(jobs)
                struck = kills(job, share, args.seed * 10_000 + turn)
                yield "SIGKILL at a random moment", job.script, struck
    elif kind == "writes":
        for job in jobs:
            for what, past in (("open", "opened"), ("rename", "renamed")):
                struck = at_writes(job, what, "kill", step=args.step)
                yield f"SIGKILL before a file is {past}", job.script, struck
    elif kind == "full_disk":
        for job in jobs:
            struck = at_writes(job, "open", "full", step=args.step)
            yield "disk full from a file on", job.script, struck
    elif kind == "signals":
        for job in jobs:
            yield "SIGINT or SIGTERM", job.script, signals(job, args.signals, args.seed)
    elif kind == "two":
        *others, evaluations = jobs
        for job in others:
            yield "second call of one job", job.script, second_call(job)
        yield "two calls side by side", evaluations.script, side_by_side(evaluations)
    else:
        for number in range(args.first, args.first + args.count):
            kind, job, _ = draw_kind(args.seed, number, jobs)
            struck = try_bad_call(args.seed, number, jobs, show=args.count == 1)
            yield f"bad {kind}", job.script, struck


def count(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Let the faults of one kind strike, print a line for each, and return what was counted."""
    faults: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: {"injected": 0, "wrong": []}))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        todo = list(tasks(kind, args, Path(folder)))
        done = pool.map(lambda task: list(task[2]), todo)
        for (fault, script, _), wrong in zip(todo, done, strict=True):
            faults[fault][script]["injected"] += len(wrong)
            faults[fault][script]["wrong"] += [line for lines in wrong for line in lines]
    for fault, by_script in faults.items():
        wrong = [line for tally in by_script.values() for line in tally["wrong"]]
        struck = sum(tally["injected"] for tally in by_script.values())
        print(f"{fault}: {struck} times, wrong: {len(wrong)}")
        print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
    return {
        "environment": describe_environment(default_device()),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "faults": {fault: dict(sorted(by_script.items())) for fault, by_script in faults.items()},
    }


def table(record: dict[str, Any]) -> str:
    """Write the record as a table in Markdown."""
    lines = ["| fault | injected | what has to happen | otherwise |", "|---|---|---|---|"]
    found = {fault: by for entry in record.values() for fault, by in entry["faults"].items()}
    for fault in (fault for fault in EXPECTED if fault in found):
        parts = {Path(script).stem: entry["injected"] for script, entry in found[fault].items()}
        each = ", ".join(f"{stem} {number}" for stem, number in parts.items())
        wrong = sum(len(entry["wrong"]) for entry in found[fault].values())
        total = sum(parts.values())
        lines.append(f"| {fault} | {total:,} ({each}) | {EXPECTED[fault]} | {wrong} |")
    return "\n".join(lines) + "\n"


def write_table(record: dict[str, Any], path: Path) -> None:
    """Replace what stands between the marks in a Markdown file."""
    before, _, rest = path.read_text("utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_text(f"{before}{MARKS[0]}{table(record)}{MARKS[1]}{after}", path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*KINDS, "all", "table"])
    parser.add_argument("docs", nargs="?", type=Path, help="with table: where it stands")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=10, help="for each of the three scripts")
    parser.add_argument("--step", type=int, default=1, help="strike at every N-th write")
    parser.add_argument("--count", type=int, default=1000, help="cases of bad input")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first case of bad input"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=os.cpu_count(), help="jobs side by side")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "faults.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    record = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    if args.what == "table":
        write_table(record, args.docs) if args.docs else print(table(record), end="")
        return 0
    failed = False
    for name in KINDS if args.what == "all" else [args.what]:
        record[name] = count(name, args)
        found = record[name]["faults"].values()
        failed |= any(entry["wrong"] for by_script in found for entry in by_script.values())
        write_text(json.dumps(record, indent=1) + "\n", args.out)
    print(f"written to {args.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
