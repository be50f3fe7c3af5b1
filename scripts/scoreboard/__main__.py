"""Evaluate distilled sets, ours or anybody's, under one protocol, and write a scoreboard.

    python -m scripts.scoreboard SET [SET ...] [--experts] [-- flags of eval.py]

Each set is measured beside as many random real images, as many as fit into its bytes, and the
whole training set; with and without augmentation. --experts adds the choices of the set's own
experts (herding, k-center). Flags behind -- go to eval.py: --model, --num_eval, --epoch_eval_train,
--data_path and what it asks for of foreign files. The same call goes on where it stopped. A set
that cannot be evaluated is named, and the rest goes on.

Exit status: 0 all sets were measured, 1 some were not, 2 bad input.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.scoreboard.page import write
from scripts.scoreboard.rows import measure_all, scores_of
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.script import Parser, run_script, split_flags


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out)
    rows, problems = measure_all(args.sets, args.eval_flags, experts=args.experts)
    if not len(rows):
        raise UserError(f"no set can be evaluated: {problems[0]}")
    write(args.out, rows, scores_of(rows), problems, argv)
    print(
        f"written: {args.out / 'scoreboard.md'}, .csv and .html, about {rows['set'].nunique()} sets"
    )
    return 1 if problems else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of("python -m scripts.scoreboard", __doc__)
    parser.add_argument("sets", metavar="SET", type=Path, nargs="+", help="files eval.py can read")
    parser.add_argument("--experts", action="store_true", help="also herding and k-center")
    help = "folder of the three files (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("scoreboard"), help=help)
    own, flags = split_flags(argv)
    args = parser.parse_args(own)
    args.eval_flags = flags
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
