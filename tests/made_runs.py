"""Run directories of hand-made records, with known answers: for several test files."""

import json
from dataclasses import asdict

import numpy as np
import yaml

from utils.options import DistillOptions

CONFIG = {
    **asdict(DistillOptions(dataset="digits", model="ConvNetD2", lr_img=3.0, lr_lr=1e-7)),
    "experts": {"number": 10, "epochs": 4},
    "environment": [],
}


def write_run(path, records, *, drop=(), **config):
    """A run directory of `records`, as long as they are unless `config` says otherwise; `drop`
    names settings that its config.yaml lacks.
    """
    path.mkdir(parents=True)
    steps = sum(record["kind"] == "step" for record in records)
    content = {**CONFIG, "Iteration": steps, "run_name": path.name, **config}
    content = {name: value for name, value in content.items() if name not in drop}
    (path / "config.yaml").write_text(yaml.safe_dump(content))
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


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
    numbers = {"acc_mean": np.mean(accs).item(), "acc_std": np.std(accs).item(), "accs": [*accs]}
    return {"kind": "eval", "iteration": iteration, "set": set, "model": model, **numbers, **others}
