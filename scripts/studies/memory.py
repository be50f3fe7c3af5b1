"""What outer steps hold in memory: by how much they raise the peak of a process.

    python -m scripts.studies.memory OUT.json <flags of distill_att.py>

The same distillation runs twice, without a step and with a few; each is a process of its own. On
the CPU: the difference of their resident memory, which counts images, experts and libraries out.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.plan.devices import PYTHON
from utils.core.errors import UserError
from utils.core.files import write_text
from utils.core.script import run_script

STEPS = 3


def main(argv: Sequence[str]) -> int:
    out, *flags = argv
    before, peak = (_peak_of_children(flags, steps) for steps in (0, STEPS))
    write_text(json.dumps({"peak_bytes": peak, "step_bytes": peak - before}) + "\n", Path(out))
    return 0


def _peak_of_children(flags: Sequence[str], steps: int) -> int:
    """The most bytes that this distillation or one before it has held."""
    with tempfile.TemporaryDirectory() as folder:
        more = ["--Iteration", str(steps), "--eval_it", "0", "--save_path", folder]
        run = subprocess.run([PYTHON, "distill_att.py", *flags, *more], stdin=subprocess.DEVNULL)
    if run.returncode:
        raise UserError(f"distill_att.py ended with status {run.returncode}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_script(main))
