"""PNG sheets: a class begins a new row, and values are clipped to what can be shown."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.pictures import save_grid

SIDE, GAP = 64, 4  # of an 8x8 image on the sheet, enlarged 8 times


def cells(path):
    """The grey value in the middle of every cell of the sheet, row by row."""
    sheet = np.asarray(Image.open(path).convert("L"))
    start, step = GAP + SIDE // 2, SIDE + GAP
    return sheet[start::step, start::step].tolist()


def save(tmp_path, *, classes, ipc):
    """Every image of a class has the grey value 10 times its label."""
    labels = torch.arange(classes).repeat_interleave(ipc)
    images = (10 * labels / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    save_grid(images, tmp_path / "sheet.png", ipc=ipc)
    return cells(tmp_path / "sheet.png")


def test_one_image_a_class_is_ten_a_row(tmp_path):
    assert save(tmp_path, classes=12, ipc=1) == [
        [10 * label for label in range(10)],
        [100, 110] + [255] * 8,
    ]


@pytest.mark.parametrize(("ipc", "rows"), [(3, 1), (20, 1), (23, 2)])
def test_a_class_begins_a_new_row(tmp_path, ipc, rows):
    sheet = save(tmp_path, classes=2, ipc=ipc)
    assert len(sheet) == 2 * rows
    shown = [[value for row in sheet[i : i + rows] for value in row] for i in (0, rows)]
    for label, values in enumerate(shown):
        assert values == [10 * label] * ipc + [255] * (len(values) - ipc)


def test_values_outside_are_clipped(tmp_path):
    images = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    save_grid(images, tmp_path / "sheet.png", ipc=1)
    assert cells(tmp_path / "sheet.png") == [[0, 255]]
