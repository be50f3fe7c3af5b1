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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.faults import strikes
from scripts.faults.bad_calls import BadCall, make_bad_call, try_bad_call
from scripts.faults.calls import ROOT
from scripts.faults.jobs import LONGER, TINY, make_jobs
from scripts.faults.strikes import Tally
from utils.core.files import write_text
from utils.core.provenance import describe_environment

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


class Task(NamedTuple):
    """A fault of EXPECTED, the script that it strikes, and the work, which counts."""

    fault: str
    script: str
    strike: Callable[[], Tally]


def kills(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """SIGKILL at random moments."""
    jobs = make_jobs(scratch / "longer", LONGER)
    for turn, first in enumerate(range(0, args.kills, KILLS_A_TURN)):
        for k, job in enumerate(jobs):
            share = (min(KILLS_A_TURN, args.kills - first) + k) // len(jobs)
            seed = args.seed * 10_000 + turn
            strike = partial(strikes.kills, job, share, seed, scratch)
            yield Task("SIGKILL at a random moment", job.script, strike)


def writes(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """SIGKILL at every single write of a short job."""
    for job in make_jobs(scratch / "tiny", TINY):
        for what, past in (("open", "opened"), ("rename", "renamed")):
            strike = partial(strikes.at_writes, job, what, "kill", scratch, step=args.step)
            yield Task(f"SIGKILL before a file is {past}", job.script, strike)


def full_disk(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """No room any more, from every single file on."""
    for job in make_jobs(scratch / "tiny", TINY):
        strike = partial(strikes.at_writes, job, "open", "full", scratch, step=args.step)
        yield Task("disk full from a file on", job.script, strike)


def signals(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """SIGINT and SIGTERM at random moments."""
    for job in make_jobs(scratch / "longer", LONGER):
        strike = partial(strikes.signals, job, args.signals, args.seed, scratch)
        yield Task("SIGINT or SIGTERM", job.script, strike)


def two(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """Two processes on the same files."""
    *others, evaluations = make_jobs(scratch / "tiny", TINY)
    for job in others:
        strike = partial(strikes.second_call, job, scratch)
        yield Task("second call of one job", job.script, strike)
    strike = partial(strikes.side_by_side, evaluations, scratch)
    yield Task("two calls side by side", evaluations.script, strike)


def bad_input(args: argparse.Namespace, scratch: Path) -> Iterator[Task]:
    """Generated command lines and files."""
    jobs = make_jobs(scratch / "tiny", TINY)

    def strike(number: int, bad: BadCall) -> Tally:
        verdict = try_bad_call(bad, jobs[-1].reference, scratch / f"case_{number}" / "job")
        if args.count == 1:
            print(f"{verdict.what}\n{bad.argv}\n{verdict.ending}\n{verdict.stderr}")
        wrong = [f"case {number}: {verdict.what}: {verdict.ending}"] if verdict.is_defect else []
        return Tally(1, wrong)

    for number in range(args.first, args.first + args.count):
        bad = make_bad_call(args.seed, number, jobs)
        yield Task(f"bad {bad.kind}", bad.script, partial(strike, number, bad))


FAULTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Task]]] = {
    "kills": kills,
    "writes": writes,
    "full_disk": full_disk,
    "signals": signals,
    "two": two,
    "bad_input": bad_input,
}


def count(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Let the faults of one kind strike; the record of what was counted."""
    tallies: dict[str, dict[str, Tally]] = defaultdict(lambda: defaultdict(Tally))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        tasks = list(FAULTS[name](args, Path(folder)))
        for task, tally in zip(tasks, pool.map(lambda task: task.strike(), tasks), strict=True):
            tallies[task.fault][task.script].add(tally)
    for fault, by_script in tallies.items():
        wrong = [line for tally in by_script.values() for line in tally.wrong]
        struck = sum(tally.injected for tally in by_script.values())
        print(f"{fault}: {struck} times, wrong: {len(wrong)}")
        print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
    return {
        "environment": describe_environment(),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "faults": {
            fault: {script: vars(tally) for script, tally in sorted(by_script.items())}
            for fault, by_script in tallies.items()
        },
    }


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
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
    parser.add_argument("what", choices=[*FAULTS, "all", "table"])
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
    for name in FAULTS if args.what == "all" else [args.what]:
        record[name] = count(name, args)
        found = record[name]["faults"].values()
        failed |= any(entry["wrong"] for by_script in found for entry in by_script.values())
        write_text(json.dumps(record, indent=1) + "\n", args.out)
    print(f"written to {args.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
