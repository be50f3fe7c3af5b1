"""The study of exactness: does it pay to differentiate all of a training run, and exactly?

Networks train for 100 steps on the images (BPTT); gradients flow through all of them, through the
last 50, 20 or 5, or by TESLA's approximation. Seeds, draws and rates are the same.
"""

from collections.abc import Iterator

from scripts.studies.trials import Trial

STEPS = 100
WINDOWS = (50, 20, 5)
COMMON = (
    f"--dataset digits --ipc 1 --method bptt --syn_steps {STEPS} --model ConvNetD2 --lr_img 0.01 "
    "--batch_target 256 --Iteration 120 --eval_it 20 --num_eval 2 --epoch_eval_train 200 "
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
