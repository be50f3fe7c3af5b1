"""Describe what a result was made with: versions, hardware, commit, command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def describe_environment(device: torch.device) -> dict[str, str]:
    """Collect the command, versions, commit and device as plain values for a run's record."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "kornia": version("kornia"),
        "device": _device_name(device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS, {platform.machine()}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def _git_commit() -> str:
    """The commit of this repository, "+" for uncommitted changes, or "unknown" outside git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
