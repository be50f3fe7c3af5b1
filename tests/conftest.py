"""Fixtures that several test files share."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"


@pytest.fixture(scope="session")
def cifar10_path() -> Iterator[Path]:
    """A data path with the real CIFAR-10 as torchvision's files, removed after the session."""
    if not UNPACK.exists():
        pytest.skip(f"the real CIFAR-10 is not here: {UNPACK} is missing")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, UNPACK, folder], check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)
