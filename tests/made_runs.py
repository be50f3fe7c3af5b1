"""Run directories of hand-made records, with known answers: for several test files."""

import json
from dataclasses import asdict

import numpy as np
import yaml

from scripts.plan.cells import Row, row_options
from utils.options import DistillOptions

CONFIG = {
    **asdict(DistillOptions(dataset="digits", model="ConvNetD2", lr_img=3.0, lr_lr=1e-7)),
    "experts": {"number": 10, "epochs": 4},
    "environment": [],
}
EXPERTS = {"number": 100, "epochs": 50, "lr_teacher": 0.01}  # those of the paper's rows
CALL = {
    "command": "python distill_att.py --ipc 10",
    "git_commit": "abc123",
    "python": "3.11.7",
    "torch": "2.12.1",
    "device": "a GPU",
}
ROW = Row("CIFAR10", None, 10)


def write_run(path, records, *, drop=(), evaluations=(), **config):
    """A run directory of `records`, as long as they are unless `config` says otherwise; `drop`
    names settings that its config.yaml lacks; `evaluations` are the entries of eval.json.
    """
    path.mkdir(parents=True)
    steps = sum(record["kind"] == "step" for record in records)
    content = {**CONFIG, "Iteration": steps, "run_name": path.name, **config}
    content = {name: value for name, value in content.items() if name not in drop}
    (path / "config.yaml").write_text(yaml.safe_dump(content))
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    if evaluations:
        (path / "eval.json").write_text(json.dumps(list(evaluations)))
    return path


def write_row(path, *, row=ROW, count=None, records=(), **changes):
    """A run of a row of the paper with these settings changed, finished unless it took `count`
    steps only.
    """
    how = {"res": 32, "experts": EXPERTS, "environment": [CALL]}
    config = {**asdict(row_options(row)), **how, **changes}
    taken = [1] * (config["Iteration"] if count is None else count)
    return write_run(path, [*steps(taken, taken), *records], **config)


def steps(lengths, n_opts, losses=None, seconds=1.0):
    return [
        {
            "kind": "step",
            "iteration": iteration,
            "loss": 1.0 if losses is None else losses[iteration],
            "length": length,
            "n_opt": n_opt,
            "start_epoch": 0,
            "syn_lr": 0.01,
            "seconds": seconds,
        }
        for iteration, (length, n_opt) in enumerate(zip(lengths, n_opts, strict=True))
    ]


def steps_without_lengths(count):
    """Of a method that matches no trajectories."""
    step = {"kind": "step", "loss": 1.0, "seconds": 1.0}
    return [step | {"iteration": iteration} for iteration in range(count)]


def fixed(path, n_opts, *, syn_steps, **config):
    records = steps([syn_steps] * len(n_opts), n_opts)
    return write_run(path, records, length="fixed", syn_steps=syn_steps, **config)


def att(path, n_opts, *, syn_steps, **config):
    return write_run(path, steps(n_opts, n_opts), length="att", syn_steps=syn_steps, **config)


def diverged(path, *, after, Iteration=5, **config):
    end = {"kind": "diverged", "iteration": after, "rate": "lr_lr", "reason": "syn_lr became -1"}
    records = [*steps([4] * after, [2] * after), end]
    return write_run(path, records, Iteration=Iteration, **config)


def curve(iteration, l2, length):
    n_opt = int(np.argmin(l2)) + 1
    return {
        "kind": "distances",
        "iteration": iteration,
        "start_epoch": 0,
        "length": length,
        "n_opt": n_opt,
        "l1": l2,
        "l2": l2,
    }


def evaluation(iteration, *accs, set="raw", model="ConvNetD2", **others):
    """In metrics.jsonl."""
    numbers = {"acc_mean": np.mean(accs).item(), "acc_std": np.std(accs).item(), "accs": [*accs]}
    return {"kind": "eval", "iteration": iteration, "set": set, "model": model, **numbers, **others}


def entry(*accs, set="raw", tag="best", model="ConvNet", epochs=1000, **others):
    """In eval.json."""
    return {
        "distilled": f"distilled_{'ema_' if set == 'ema' else ''}{tag}.pt",
        "trained_on": f"distilled {set}",
        "model": model,
        "epochs": epochs,
        "num_eval": len(accs),
        "accs": list(accs),
        "acc_mean": sum(accs) / len(accs),
        "acc_std": 0.0,
        "seed": 0,
        "environment": CALL | {"command": "python eval.py --distilled x"},
        **others,
    }
