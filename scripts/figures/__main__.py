"""The paper's figures, drawn from run directories alone.

    python -m scripts.figures [RUN_DIR ...] [--out docs/figures]

A path may be a run directory or a folder of them at any depth. Each figure comes as PNG and PDF,
one for each data set; a figure whose runs are not there, and a run that cannot be used, are named
in one line each.

    fig1        distance to the target along a student's trajectory, and the step that is matched
    fig2        how far the matched step is from the nearest one, every --interval iterations
    fig4_left   the length that ATT chooses
    fig4_right  runs that do not diverge when lr_img or lr_lr is multiplied
    accuracy    over iterations and over time
    images      before and after

Exit status: 0 something was drawn, 2 nothing was.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from scripts.figures import data, drawing
from scripts.results.runs import Run, read_runs
from utils.core.errors import UserError
from utils.core.script import Parser, run_script

Figures = Mapping[str, tuple[Callable[[Sequence[Run]], Any], Callable[[Any], Figure]]]


def figures(*, gamma: float, interval: int) -> Figures:
    """By name: what a figure shows, collected from runs, and how it is drawn."""
    how: dict[str, Any] = {"gamma": gamma, "interval": interval}
    return {
        "fig1": (data.distance_curves, drawing.draw_distances),
        "fig2": (partial(data.mismatches, **how), partial(drawing.draw_mismatches, **how)),
        "fig4_left": (data.chosen_lengths, drawing.draw_lengths),
        "fig4_right": (data.successes, drawing.draw_successes),
        "accuracy": (data.accuracies, drawing.draw_accuracies),
        "images": (data.pictures, drawing.draw_pictures),
    }


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    runs, problems = read_runs(args.runs, attrgetter("steps"), also=data.EVALUATION)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        raise UserError(f"no finished run in {', '.join(map(str, args.runs))}")
    drawn = 0
    for dataset in sorted(set(map(data.dataset_of, runs))):
        own = [run for run in runs if data.dataset_of(run) == dataset]
        for name, (collect, draw) in figures(gamma=args.gamma, interval=args.interval).items():
            path = args.out / f"{name}_{dataset}"
            try:
                found = collect(own)
            except data.Missing as wanted:
                print(f"{path.name} skipped: it needs {wanted}")
                continue
            with rc_context(drawing.STYLE):
                figure = draw(found)
            print(*drawing.save(figure, path))
            drawn += 1
    return 0 if drawn else 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of("figures.py", __doc__)
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("results")])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--gamma", type=float, default=2, help="tolerance of fig2, in steps")
    parser.add_argument("--interval", type=int, default=50, help="of fig2, in outer iterations")
    args = parser.parse_args(argv)
    if args.interval < 1:
        raise UserError(f"--interval must be at least 1, not {args.interval}")
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
