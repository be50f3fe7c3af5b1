"""The benchmarks run and leave their JSON; nothing is timed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench.py"
TINY = "--model ConvNetD1 --classes 2 --res 8 --repeats 1".split()


@pytest.mark.parametrize(
    ("flags", "variants"),
    [
        ("unroll --syn_steps 2 --variants twin short eager --no_peaks", 3),
        pytest.param("experts --networks 2 --steps 1 --batch_train 4", 5, marks=pytest.mark.slow),
        pytest.param("evaluation --networks 2 --epochs 1", 5, marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_leaves_its_results(tmp_path, flags, variants):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(BENCH), *flags.split(), *TINY, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    assert len(record["results"]) == variants
    assert {"device", "torch", "command"} <= set(record["environment"])
