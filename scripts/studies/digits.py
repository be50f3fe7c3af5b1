"""The study of all methods: digits at 8x8 and 32x32 pixels, one image a class and ten.

What is common to all is cheap enough for two CPU cores: 20 to 60 outer steps, small networks,
students of 20 steps, so that all of it takes about an hour. Rates are those of the rows in
configs/digits where a method has one, else the ones that were found to work; nothing else is tuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from scripts.report.markdown import markdown
from scripts.studies.page import (
    IMAGES_ALONE,
    Runs,
    raised_megabytes,
    scores,
    seconds_a_step,
    table,
)
from scripts.studies.trials import SEEDS, Trial

COMMON = "--eval_it 0 --compile off --dataset digits"
REAL = "--random --herding --k_center --forgetting --lowest_loss"
MATCHING = "--syn_steps 20 --expert_epochs 2 --lr_lr 1e-7 --lr_teacher 0.01"
EARLY = "--max_start_epoch 2"
OTHERS = "--num_eval 1 --epoch_eval_train 40 --eval_mode M"


@dataclass(frozen=True)
class Place:
    """Images of a side and their number a class; the network, the rate of matched images."""

    side: int
    ipc: int
    network: str
    lr_img: str
    steps: int  # outer ones
    epochs: int  # of evaluation networks
    has_others: bool = False  # its sets train the paper's four architectures too

    def __str__(self) -> str:
        return f"{self.side}x{self.side}, IPC {self.ipc}"

    def evaluations(self, more: str) -> tuple[str, ...]:
        """The flags of each call of eval.py, with `more` of them."""
        own = f"--num_eval 2 --epoch_eval_train {self.epochs} {more}"
        return (own, f"{OTHERS} {more}") if self.has_others else (own,)


SMALL, LARGE = "--model ConvNetD2", "--res 32 --model ConvNetW32"
PLACES = (
    Place(8, 1, SMALL, "--lr_img 3", 60, 200),
    Place(8, 10, SMALL, "--lr_img 3", 30, 100),
    Place(32, 1, LARGE, "--lr_img 300", 30, 150, has_others=True),
    Place(32, 10, LARGE, "--lr_img 300", 20, 60),
)


def trials() -> Iterator[Trial]:
    """Every method at every place; ATT's sets are measured beside real images."""
    for place in PLACES:
        common = f"{COMMON} --Iteration {place.steps} {place.network} --ipc {place.ipc}"
        for line, (row, flags) in methods(place).items():
            evaluations = {
                seed: place.evaluations(f"{REAL} --seed {seed}" if line == "ATT" else "")
                for seed in SEEDS
            }
            yield Trial(line, str(place), row, f"{common} {flags}", evaluations)


def methods(place: Place) -> dict[str, tuple[str, str]]:
    """By its line in the table, the row that a method starts from, and its flags."""
    batch = "" if place.ipc == 1 else "--batch_syn 20"
    matching = f"{MATCHING} {place.lr_img} {batch}"
    early, late = f"{matching} {EARLY}", f"{matching} --start_epochs 0 2"
    real_loss = "--lr_img 0.01 --batch_target 256"
    loops = "" if place.ipc == 1 else "--outer_loop 10 --inner_loop 10"
    found = {
        "ATT": f"--method att {early}",
        "MTT": f"--method mtt {early}",
        "FTD": f"--method ftd {early}",
        "PP": f"--method pp {early}",
        "TESLA": f"--method tesla {early}",
        "ATT + soft labels": f"--method att --soft_labels {early}",
        "DATM": f"--method datm {late}",
        "PAD": f"--method pad {late}",
        "BPTT": f"--method bptt --syn_steps 20 {real_loss} {batch}",
        "DD": f"--method dd --distill_steps {place.ipc} {real_loss}",
        "LD": "--method ld --Iteration 200 --lr_y 5e-3 --batch_target 256",
        "DM": "--method dm --lr_img 10",
        "DC": f"--method dc {loops}",
        "DSA": f"--method dsa {loops}",
        "CAFE": "--method cafe",
        "CAFE+DSA": "--method cafe_dsa",
        "KIP": "--method kip --learn_labels --batch_target 500",
        "Label Solve": "--method label_solve --Iteration 1",
    }
    rows = {"BPTT": "ipc1_bptt", "DD": "", "Label Solve": "ipc1_label_solve"}
    rows["CAFE+DSA"] = "ipc1_cafe"
    rows |= {line: f"ipc1_{line.lower()}" for line in ("LD", "DM", "DC", "DSA", "CAFE", "KIP")}
    return {line: (rows.get(line, "ipc1"), flags) for line, flags in found.items()}


TITLE = "# Every method on the same digits"
ABOUT = """
Test accuracies in percent, mean ± population standard deviation over the means of three seeds. All
methods but LD (200) and Label Solve (one) take as many outer steps at a place, from the same draws:
60 at 8x8 and IPC 1, then 30, 30 and 20; students take 20 steps, of DD and LD as many as the method
says. It is a comparison of short runs on small images, no reproduction of anything.
"""
REGIMES = """
What a method learned beside images is part of these figures: soft labels store as many numbers an
image as there are classes, learned steps replace the protocol, kernel regression trains no network
(networks that train on KIP's and Label Solve's sets take the classes alone). They compare with one
another, not with the table above, which has the same sets with their classes alone.
"""
ARCHITECTURES = """
The sets of 32x32 pixels and IPC 1 train the paper's four architectures for 40 epochs, one network a
seed.
"""
COSTS = """
Seconds are the median of an outer step, with two runs side by side on two cores. Memory is by how
much outer steps raised the peak of their process.
"""


def page(runs: Runs, out: Path) -> str:
    """The tables."""
    found = scores(runs)
    own, others = found[found["is_own"]], found[~found["is_own"]]
    parts = [TITLE, ABOUT, table(own[own["regime"] == IMAGES_ALONE], "place")]
    parts += ["## With what else was learned", REGIMES]
    for regime, same in own[own["regime"] != IMAGES_ALONE].groupby("regime", sort=False):
        parts += [f"{regime.removeprefix('raw, ').capitalize()}:\n", table(same, "place")]
    parts += ["## Other architectures", ARCHITECTURES] if len(others) else []
    for (place, regime), same in others.groupby(["place", "regime"], sort=False):
        title = f"{place}{regime.removeprefix(IMAGES_ALONE)}"
        parts += [f"{title}:\n", table(same, "network")]
    parts += ["## Cost", COSTS, costs(runs)]
    return "\n".join(parts)


def costs(runs: Runs) -> str:
    """Seconds and megabytes of an outer step: a row for each method, two columns a place."""
    rows = [
        {
            "line": trial.line,
            "place": trial.place,
            "seconds": seconds_a_step(run),
            "megabytes": raised_megabytes(run),
        }
        for trial, run in runs
    ]
    medians = pd.DataFrame(rows).groupby(["line", "place"], sort=False).median()
    places = list(dict.fromkeys(trial.place for trial, _ in runs))
    shown = medians.assign(
        seconds=medians["seconds"].map("{:.2f}".format),
        megabytes=medians["megabytes"].map("{:.0f}".format, na_action="ignore"),
    )
    wide = shown.unstack().swaplevel(axis=1).fillna("")
    units = [(place, unit) for place in places for unit in ("seconds", "megabytes")]
    head = [f"{place}, {'s' if unit == 'seconds' else 'MB'}" for place, unit in units]
    lines = dict.fromkeys(trial.line for trial, _ in runs)
    return markdown(["", *head], ([line, *wide.loc[line, units]] for line in lines))
