"""The study of exactness: does it pay to differentiate all of a training run, and exactly?

Networks train for 100 steps on the images (BPTT); gradients flow through all of them, through the
last 50, 20 or 5, or by TESLA's approximation. Seeds, draws and rates are the same.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from scripts.figures.drawing import COLUMN, ITERATION, LOOKS, STYLE
from scripts.results.evaluations import logged_evaluations
from scripts.studies.page import Runs, seconds_a_step, table
from scripts.studies.trials import Trial

STEPS = 100
WINDOWS = (50, 20, 5)
COMMON = (
    f"--dataset digits --ipc 1 --method bptt --syn_steps {STEPS} --model ConvNetD1 --lr_img 0.01 "
    "--batch_target 256 --Iteration 80 --eval_it 20 --num_eval 2 --epoch_eval_train 200 "
    "--compile off --unroll adjoint"
)


def trials() -> Iterator[Trial]:
    """Each way to the gradient."""
    ways = {
        "exact": "",
        **{f"last {window} steps": f"--window {window}" for window in WINDOWS},
        "TESLA": "--gradient tesla",
    }
    for line, flags in ways.items():
        yield Trial(line, "exactness", "ipc1_bptt", f"{COMMON} {flags}")


TITLE = "# Does an exact gradient pay?"
ABOUT = """
Networks train for 100 steps on ten synthetic digits of 8x8 pixels, and the loss of the trained
network on real images is differentiated through all of these steps, through the last ones alone
(truncated back-propagation), or by TESLA's approximation, which drops the path through later
parameters. Test accuracies in percent, mean ± population standard deviation over the means of three
seeds; all ways see the same networks, batches and real images.
"""
FIGURE = "study_exactness.png"


def page(runs: Runs, out: Path) -> str:
    """Accuracies over outer steps and over time."""
    found = curves(runs)
    draw(found).savefig(out / FIGURE, metadata={"Software": None})
    parts = [TITLE, ABOUT, "After so many outer steps:\n", table(found, "iteration")]
    seconds = found.groupby("line", sort=False)["seconds_a_step"].median()
    costs = ", ".join(f"{line} {value:.2f} s" for line, value in seconds.items())
    parts += [f"An outer step takes, with two runs side by side on two cores: {costs}.\n"]
    parts += [f"![accuracy over outer steps, and over time]({FIGURE})\n"]
    return "\n".join(parts)


def curves(runs: Runs) -> pd.DataFrame:
    """line, seed, iteration, accuracy (of the raw set, in percent), seconds_a_step."""
    return pd.DataFrame(
        {
            "line": trial.line,
            "seed": run.options.seed,
            "iteration": each["iteration"],
            "accuracy": 100 * each["acc_mean"],
            "seconds_a_step": seconds_a_step(run),
        }
        for trial, run in runs
        for each in logged_evaluations(run)
        if each["set"] == "raw"
    )


def draw(found: pd.DataFrame) -> Figure:
    """The means over seeds against outer steps and against the time that these take."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.4))
        steps, time = figure.subplots(1, 2, sharey=True)
        for look, (line, same) in zip(LOOKS, found.groupby("line", sort=False), strict=False):
            mean = same.groupby("iteration")["accuracy"].mean()
            steps.plot(mean.index, mean, label=line, **look)
            time.plot(mean.index * same["seconds_a_step"].median(), mean, **look)
        steps.set(xlabel=ITERATION, ylabel="test accuracy, %")
        time.set(xlabel="seconds in outer steps")
        steps.legend()
    return figure
