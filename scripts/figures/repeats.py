"""One distillation several times, with the seeds 0, 1, ..., in one process.

    python -m scripts.figures.repeats 20 --dataset digits --run_name fig4 --lr_img 30

Behind the number come flags of distill_att.py. The runs are called <run_name>_seed<k>. One that
diverges is an outcome: the others follow. Those that have ended are left alone, so the same call
again goes on. Of the distilled sets none is kept, since with ZCA each takes 74 MB: what is asked
of the repeats is in metrics.jsonl, and `distill_att.py` makes a set again from the checkpoint.
"""

import sys
from collections.abc import Sequence

import distill_att
from utils.config.resolve import resolve
from utils.core.errors import UserError
from utils.core.script import run_script
from utils.options import DistillOptions
from utils.run.directory import RunDir
from utils.run.log import read_records


def main(argv: Sequence[str]) -> int:
    count, flags = _number(argv[:1]), list(argv[1:])
    options = resolve(
        DistillOptions, flags, description=__doc__ or "", find_yaml=distill_att.find_yaml
    ).options
    if options.run_name is None:
        raise UserError("repeats need a --run_name, to which their seeds are added")
    for seed in range(count):
        run_name = f"{options.run_name}_seed{seed}"
        run = RunDir.of(options, run_name)
        if has_ended(run, options.Iteration):
            print(f"{run.path} has ended")
            continue
        repeat(run, [*flags, "--seed", str(seed), "--run_name", run_name])
    return 0


def repeat(run: RunDir, flags: list[str]) -> None:
    """Run distill_att.py as a call of its own does, which its record then names."""
    sys.argv = ["distill_att.py", *flags]
    distill_att.main(flags)
    for file in run.path.glob("distilled_*.pt"):
        file.unlink()


def has_ended(run: RunDir, iterations: int) -> bool:
    """Whether the run has taken all its outer steps, or diverged."""
    kinds = [record["kind"] for record in read_records(run.metrics)]
    return "diverged" in kinds or kinds.count("step") >= iterations


def _number(words: Sequence[str]) -> int:
    if not words or not words[0].isdecimal():
        raise UserError(f"the number of repeats comes first, not {' '.join(words) or 'nothing'}")
    return int(words[0])


if __name__ == "__main__":
    sys.exit(run_script(main))
