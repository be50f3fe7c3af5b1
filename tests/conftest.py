"""Fixtures that several test files share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read where torch is imported

import pytest
from short_runs import distill, train_experts

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"


def pytest_collection_modifyitems(items):
    """The longest file begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_run_all.py")


@pytest.fixture(scope="session")
def cifar10_path() -> Iterator[Path]:
    """A data path with the real CIFAR-10 as torchvision's files, removed after the session."""
    if not UNPACK.exists():
        pytest.skip(f"the real CIFAR-10 is not here: {UNPACK} is missing")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, UNPACK, folder], check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    return train_experts(tmp_path_factory.mktemp("buffers"), 2)


@pytest.fixture(scope="session")
def finished(experts, tmp_path_factory):
    """A finished short run."""
    return distill(experts, tmp_path_factory.mktemp("results"))
