"""Run a script whose work does not come to an end: python tests/stuck.py NUMBER SCRIPT ARGUMENTS.

The outer step or the training NUMBER, from 0 on, neither ends nor lets a signal end it, as where a
compiler is at work. The file `stuck` in the working directory says that it has begun.
"""

import itertools
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.compute.cohort import Cohort
from utils.core import stopping
from utils.methods.trajectory.method import TrajectoryMatching

number, script, *arguments = sys.argv[1:]
patched, name = (TrajectoryMatching, "step") if script == "distill_att.py" else (Cohort, "train")
function, count = getattr(patched, name), itertools.count()


def stuck(*args, **kwargs):
    if next(count) < int(number):
        return function(*args, **kwargs)
    Path("stuck").touch()
    while True:
        with suppress(stopping.Interrupted):
            time.sleep(60)


setattr(patched, name, stuck)
stopping.GRACE_SECONDS = 0.2
path = str(Path(__file__).parent.parent / script)
sys.argv = [path, *arguments]
runpy.run_path(path, run_name="__main__")
