"""The code for an H100, generated without one: its kernels compile, its launches are counted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COLUMNS = (
    "function | batch | Triton | matrix products | convolutions forward | backward calls (outputs)"
)
# (function, images a batch), as in the table
CASES = (
    ("gradient", "10"),
    ("gradient", "256"),
    ("adjoint", "10"),
    ("adjoint", "100"),
    ("training step", "256"),
)


def section() -> str:
    """The lines of docs/performance.md on launches."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    _, found, rest = text.partition("\n### Launches\n")
    assert found, "docs/performance.md has no heading '### Launches'"
    return re.split(r"^#", rest, flags=re.MULTILINE)[0]


def table() -> dict[tuple[str, str], list[str]]:
    """The counts of each case, as written."""
    _, found, rest = section().partition(f"| {COLUMNS} |\n")
    assert found, f"no table with the columns {COLUMNS}"
    _, *lines = rest.split("\n\n")[0].strip().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {(function, batch): counts for function, batch, *counts in rows}


def test_the_table_holds_the_cases():
    assert sorted(table()) == sorted(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "batch"), CASES)
def test_launches_are_those_of_the_table(function, batch):
    pytest.importorskip("triton", reason="compiling kernels takes triton, which is not here")
    counted_with = re.search(r"torch (\d+\.\d+\.\d+)", section())
    assert counted_with, "the section does not say with which torch launches were counted"
    if torch.__version__.partition("+")[0] != counted_with[1]:
        pytest.skip(f"launches were counted with torch {counted_with[1]}, not {torch.__version__}")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sm90", function.split()[0], "--batch", batch],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # the same code with a GPU as without
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["kernels"] > 0
    assert counts["other"] == 0, "launches that the table has no column for"
    assert counts["nhwc"] == counts["forward"] + counts["backward"]
    assert [
        str(counts["triton"]),
        str(counts["products"]),
        str(counts["forward"]),
        f"{counts['backward']} ({counts['outputs']})",
    ] == table()[function, batch]
