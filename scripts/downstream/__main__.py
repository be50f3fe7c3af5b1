"""Try a distilled set on what such sets are used for, beside as many random real images.

    python -m scripts.downstream continual SET [--steps 5]   # classes come in steps (GDumb)
    python -m scripts.downstream search SET                  # does it rank networks as all data do?
    python -m scripts.downstream privacy SET                 # does it tell who was in the data?

Flags behind -- go to eval.py: --num_eval, --epoch_eval_train, --data_path, --full (all training
images as a line too; search and privacy always have it). Prints a table and writes it, as CSV, to
--out.

Exit status: 0 done, 2 bad input.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

import eval as evaluation
from scripts.downstream.continual import learn_in_steps
from scripts.downstream.lines import Line, lines_of
from scripts.downstream.privacy import attack_networks
from scripts.downstream.search import GRID, correlations
from scripts.report.markdown import markdown
from utils.compute.cost import fitting_models
from utils.core.errors import UserError
from utils.core.files import check_writable, write_text
from utils.core.script import Parser, run_script, split_flags
from utils.data.dataset import ImageDataset
from utils.measure.protocol import Accuracies

FLAGS = {"continual": "--random", "search": "--random --full", "privacy": "--random --full"}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    check_writable(args.out.parent)
    flags = ["--distilled", str(args.set), *FLAGS[args.what].split(), *args.eval_flags]
    options = evaluation.parse(flags)
    distilled = evaluation.load(options)
    measurement = evaluation.prepare(options, distilled)
    if measurement is None:
        return 0
    found = TABLES[args.what](measurement, args)
    write_text(found.to_csv(index=False), args.out)
    print(markdown([*found.columns], found.round(3).itertuples(index=False)))
    print(f"written: {args.out}")
    return 0


def continual(measurement: evaluation.Measurement, args: argparse.Namespace) -> pd.DataFrame:
    """Accuracy on the classes so far, in percent: a row for each line, a column for each step."""

    def train(line: Line, data: ImageDataset) -> Accuracies:
        return _train(replace(measurement, data=data), line)

    found = learn_in_steps(_lines(measurement), measurement.data, args.steps, train)
    rows = [(name, f"{seen} classes", f"{each}") for name, seen, each in found]
    frame = pd.DataFrame(rows, columns=["line", "seen", "accuracy"])
    wide = frame.pivot(index="line", columns="seen", values="accuracy")
    return wide.loc[frame["line"].unique(), frame["seen"].unique()].reset_index()


def search(measurement: evaluation.Measurement, args: argparse.Namespace) -> pd.DataFrame:
    """How each line ranks the networks, beside the whole training set."""
    networks, left_out = fitting_models(GRID, **measurement.call.size.shape)
    for reason in left_out:
        print(f"left out: {reason}")
    *lines, full = _lines(measurement)
    by_line = {
        line.name: {name: _train(measurement, line, name).mean for name in networks}
        for line in (*lines, full)
    }
    rows = [
        (name, *correlations(by_line[name], by_line[full.name]), max(by_line[name].values()))
        for name in by_line
    ]
    return pd.DataFrame(rows, columns=["line", "spearman", "kendall", "best accuracy"])


def privacy(measurement: evaluation.Measurement, args: argparse.Namespace) -> pd.DataFrame:
    """How well the losses of networks tell training images from test images."""
    rows = []
    for line in _lines(measurement):
        for members, found in attack_networks(measurement, line):
            rows.append((line.name, members, found.auc, found.advantage))
    return pd.DataFrame(rows, columns=["line", "members", "auc", "advantage"])


TABLES = {"continual": continual, "search": search, "privacy": privacy}


def _lines(measurement: evaluation.Measurement) -> list[Line]:
    classes = measurement.call.distilled.labels.to(measurement.data.test.labels.device)
    found = [*lines_of(measurement.training_sets(), classes)]
    if not found:
        raise UserError("no line of this set trains by the common protocol")
    return found


def _train(measurement: evaluation.Measurement, line: Line, model: str | None = None) -> Accuracies:
    model = model or measurement.call.models[0]
    return measurement.evaluate(line.training_set, model)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of("python -m scripts.downstream", __doc__)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("set", metavar="SET", type=Path, help="a file that eval.py can read")
    help = "steps in which the classes come, of continual (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=5, help=help)
    help = "the file to write (default: <what>.csv)"
    parser.add_argument("--out", type=Path, help=help)
    own, flags = split_flags(argv)
    args = parser.parse_args(own)
    args.eval_flags, args.out = flags, args.out or Path(f"{args.what}.csv")
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
