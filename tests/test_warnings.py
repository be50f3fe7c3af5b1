"""Stderr of the scripts: nothing that libraries say of a machine and nobody can change."""

import os
import re
import subprocess
import sys

import pytest
from short_runs import ROOT, SHORT

WARNING = re.compile(r"^.*(?:warn|^\[?W\d{4}|^\[W|CUDA).*$", re.IGNORECASE | re.MULTILINE)
IMPORT = """
from utils.core.script import run_script
run_script(lambda argv: __import__("torch.utils.cpp_extension") and 0)
"""


def warnings_of(*command):
    """On a machine with CUDA's tools and without a GPU, where torch speaks up."""
    without_gpu = {**os.environ, "CUDA_HOME": "/usr/local", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=without_gpu,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return WARNING.findall(done.stderr)


def test_cuda_tools_without_a_gpu():
    """What the compiler imports: silent in a script, and not elsewhere."""
    assert warnings_of("-c", IMPORT) == []
    assert len(warnings_of("-c", "import torch.utils.cpp_extension")) == 1


def test_a_short_run(experts, tmp_path):
    argv = [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--run_name", "run"]
    assert warnings_of("distill_att.py", *argv) == []
    best = tmp_path / "digits/ConvNetD2/ipc1/run/distilled_best.pt"
    short = ["--num_eval", "1", "--epoch_eval_train", "2", "--random"]
    assert warnings_of("eval.py", "--distilled", best, *short) == []


@pytest.mark.slow
def test_a_compiled_run(experts, tmp_path):
    argv = [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--compile", "on"]
    assert warnings_of("distill_att.py", *argv) == []
