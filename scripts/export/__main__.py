"""Export a distilled set: as a bundle that trains by itself, or in the formats of others.

    python -m scripts.export SET --to DIR [--format bundle ...]

SET is a file distilled_<tag>.pt; what eval.py measured on it is read from eval.json beside it. DIR
is made; with several formats each gets a folder of its name in it. recipe.json goes with each.

    bundle       safetensors, pictures, a card, and train.py, which needs torch and safetensors
    huggingface  Parquet with a card, for load_dataset
    ddranking    images.pt, labels.pt, lr.pt, config.yaml
    mtt          images_best.pt, labels_best.pt (classes)
    datm         images_best.pt, labels_best.pt (logits), lr_best.pt
    png          a folder of pictures for each class
    npz          one file for numpy

Exit status: 0 all is written, 2 bad input.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.export import bundle, ddranking, huggingface, mtt, npz, pictures
from scripts.export.contents import Contents
from utils.core.errors import UserError
from utils.core.files import atomic_folder, check_new_folder, write_text
from utils.core.pictures import shown_as
from utils.core.script import Parser, run_script
from utils.data.ready import RECIPE


class Format(NamedTuple):
    """How a set is written into a folder, and what refuses the sets that cannot be."""

    check: Callable[[Contents], None]
    write: Callable[[Contents, Path], None]


FORMATS = {
    "bundle": Format(bundle.check, bundle.write),
    "huggingface": Format(huggingface.check, huggingface.write),
    "ddranking": Format(ddranking.check, ddranking.write),
    "mtt": Format(mtt.check_mtt, mtt.write_mtt),
    "datm": Format(mtt.check_datm, mtt.write_datm),
    "png": Format(pictures.check, pictures.write),
    "npz": Format(npz.check, npz.write),
}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    check_new_folder(args.to)
    contents = Contents.read(args.set)
    for name in args.format:
        FORMATS[name].check(contents)
    say_what_is_missing(contents, args.set)
    with atomic_folder(args.to) as folder:
        for name in args.format:
            place = folder / name if len(args.format) > 1 else folder
            place.mkdir(exist_ok=True)
            FORMATS[name].write(contents, place)
            write_text(json.dumps(contents.recipe, indent=1) + "\n", place / RECIPE)
    print(f"written: {args.to} ({', '.join(args.format)})")
    return 0


def say_what_is_missing(contents: Contents, path: Path) -> None:
    """Say what an export does not tell, or not as it is."""
    if contents.recipe["accuracy"] is None:
        print(
            "the accuracy of this set with its own network is not in eval.json beside it: exported "
            f"without; python eval.py --distilled {path} measures it"
        )
    if shown := shown_as(contents.recipe["image_shape"][0]):
        print(f"pictures show {shown}")
    for note in contents.recipe["notes"]:
        print(note)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of("python -m scripts.export", __doc__)
    parser.add_argument("set", type=Path, metavar="SET", help="a file distilled_<tag>.pt")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder that is to be made"
    )
    parser.add_argument(
        "--format", nargs="+", default=["bundle"], choices=FORMATS, help="default: bundle"
    )
    args = parser.parse_args(argv)
    if repeated := [name for name in FORMATS if args.format.count(name) > 1]:
        raise UserError(f"--format {repeated[0]} is given twice")
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
