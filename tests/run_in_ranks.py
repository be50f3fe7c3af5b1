"""Run scripts in this process group, one after another: a list of [script, argv] as JSON.

torchrun starts it; one start for several scripts, because importing torch takes seconds.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import buffer
import distill_att
import eval as evaluation
from utils.core import ranks

SCRIPTS = {"buffer": buffer, "distill_att": distill_att, "eval": evaluation}

with ranks.process_group():
    for script, argv in json.loads(sys.argv[1]):
        status = SCRIPTS[script].run(SCRIPTS[script].parse(argv))
        assert status != 1, script  # that of a run which has diverged
