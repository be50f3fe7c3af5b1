"""The study of lengths: ATT beside the fixed length at several N_S, and what else may matter.

At 32x32 pixels several N_S, and the four architectures at one of them. At 8x8 what could explain a
difference from the paper, the initial images and the number of experts, and longer runs.
"""

from collections.abc import Iterator
from pathlib import Path

from scripts.studies.page import Runs, scores, table
from scripts.studies.trials import SEEDS, Trial, slug

LARGE = "--res 32 --model ConvNetW32 --lr_img 300 --Iteration 60 --eval_it 30 --num_eval 3"
SMALL = "--syn_steps 20 --num_eval 2 --epoch_eval_train 100"
SHORT, LONG = "--Iteration 150 --eval_it 50", "--Iteration 1000 --eval_it 250"
PLACES = {
    **{f"32x32, N_S {n}": f"{LARGE} --syn_steps {n}" for n in (20, 10, 30)},
    "8x8, from noise": f"{SMALL} {SHORT} --pix_init noise",
    "8x8, 2 experts": f"{SMALL} {SHORT} --max_experts 2",
    "8x8, 1000 steps": f"{SMALL} {LONG}",
    "8x8, 1000 steps from noise": f"{SMALL} {LONG} --pix_init noise",
}
CROSS = "--num_eval 1 --epoch_eval_train 200 --eval_mode M"

TITLE = "# Automatic and fixed lengths"
ABOUT = """
Digits, one image a class. Test accuracies in percent, mean ± population standard deviation over the
means of three seeds, of the iteration that is best on the test set.
"""
ARCHITECTURES = """
The last sets train the paper's four architectures for 200 epochs, one network a seed:
"""


def trials() -> Iterator[Trial]:
    """Both policies at every place."""
    for place, flags in PLACES.items():
        cross = dict.fromkeys(SEEDS, (CROSS,)) if place == "32x32, N_S 20" else {}
        for line, length in (("ATT", "att"), ("fixed", "fixed")):
            common = f"--dataset digits --ipc 1 --log_distances 10 --length {length} {flags}"
            yield Trial(line, place, "ipc1", common, cross, name=slug(f"{place} {line}"))


def page(runs: Runs, out: Path) -> str:
    """The tables."""
    found = scores(runs)
    own, others = found[found["is_own"]], found[~found["is_own"]]
    parts = [TITLE, ABOUT, table(own, "place"), ARCHITECTURES, table(others, "network")]
    return "\n".join(parts)
