"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

# Read where torch is imported. Tests run side by side: each on one thread that sleeps as it waits.
os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}

import pytest
from filelock import FileLock
from short_runs import distill, train_experts

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"


def pytest_collection_modifyitems(items):
    """The longest file begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_run_all.py")


@pytest.fixture(scope="session")
def cifar10_path(tmp_path_factory) -> Path:
    """A data path with the real CIFAR-10 as torchvision's files, one for all workers."""
    if not UNPACK.exists():
        pytest.skip(f"the real CIFAR-10 is not here: {UNPACK} is missing")
    of_all = tmp_path_factory.getbasetemp()
    of_all = of_all.parent if "PYTEST_XDIST_WORKER" in os.environ else of_all
    folder = of_all / "cifar10"
    with FileLock(of_all / "cifar10.lock"):
        if not folder.exists():
            subprocess.run([sys.executable, UNPACK, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    return train_experts(tmp_path_factory.mktemp("buffers"), 2)


@pytest.fixture(scope="session")
def finished(experts, tmp_path_factory):
    """A finished short run."""
    return distill(experts, tmp_path_factory.mktemp("results"))
