"""Read the dict that DC, DSA, DM and DataDAM write: in "data" a pair of images and labels for each
experiment.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from utils.core.errors import UserError
from utils.data.foreign.content import PAIR, Content, Stated, as_images, as_labels, described
from utils.data.values import shown

KEY = "data"


def read_experiments(path: Path, value: Any, stated: Stated) -> Content | None:
    """Read one of the experiments: the one that --experiment says, else the first."""
    if not isinstance(value, dict) or KEY not in value:
        return None
    pairs = value[KEY]
    if not isinstance(pairs, list | tuple) or not pairs:
        raise UserError(f'{shown(path)}: its "{KEY}" holds {described(pairs)}, no experiments')
    if isinstance(pairs[0], Tensor):
        pairs = [pairs]
    number = stated.experiment or 0
    if number >= len(pairs):
        raise UserError(
            f"--experiment {number}: {shown(path)} holds {len(pairs)}, so 0 ... {len(pairs) - 1}"
        )
    pair = pairs[number]
    if not isinstance(pair, list | tuple) or len(pair) != PAIR:
        raise UserError(
            f"{shown(path)}: experiment {number} holds {described(pair)}, no images and labels"
        )
    images = as_images(pair[0], path)
    chosen = f"experiment {number} of {len(pairs)}; --experiment chooses another"
    return Content(
        'a dict with "data", as DC, DSA, DM and DataDAM write',
        images,
        as_labels(pair[1], path, len(images)),
        statistics="dc",
        why="as in the code of DC",
        said=(chosen,) if len(pairs) > 1 else (),
    )
