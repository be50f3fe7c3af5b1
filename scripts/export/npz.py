"""One file for numpy: distilled.npz."""

from pathlib import Path

import numpy as np

from scripts.export.contents import Contents


def check(contents: Contents) -> None:
    """Every set can be written."""


def write(contents: Contents, folder: Path) -> None:
    """Write the arrays that `tensors_of` names."""
    arrays = {name: value.numpy() for name, value in contents.tensors.items()}
    np.savez(folder / "distilled.npz", allow_pickle=False, **arrays)
