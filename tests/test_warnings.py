"""Stderr of the scripts: nothing that libraries say of a machine and nobody can change."""

import os
import re
import subprocess
import sys

import pytest
from short_runs import ROOT, SHORT

WARNING = re.compile(r"^.*(?:warn|^\[?W\d{4}|^\[W|CUDA).*$", re.IGNORECASE | re.MULTILINE)
WHAT_TORCH_TALKS_AT = """
import torch
from utils.core.script import run_script

def main(argv):
    from torch.utils import cpp_extension  # as its compiler does
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    return 0

run_script(main)
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


def test_what_torch_talks_at_is_silent_in_a_script_and_not_elsewhere():
    assert warnings_of("-c", WHAT_TORCH_TALKS_AT) == []
    assert len(warnings_of("-c", "import torch.utils.cpp_extension")) == 1


def test_a_short_run(experts, tmp_path):
    argv = [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--run_name", "run"]
    assert warnings_of("distill_att.py", *argv) == []
    best = tmp_path / "digits/ConvNetD1/ipc1/run/distilled_best.pt"
    short = ["--num_eval", "1", "--epoch_eval_train", "2", "--random"]
    assert warnings_of("eval.py", "--distilled", best, *short) == []


@pytest.mark.slow
def test_a_compiled_run(experts, tmp_path):
    argv = [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--compile", "on"]
    assert warnings_of("distill_att.py", *argv) == []
