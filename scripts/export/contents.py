"""What is exported: a set, how networks are trained on it, what was measured, where it is from."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from networks import canonical_name
from utils.compute.device import storage_dtype
from utils.core.errors import UserError
from utils.data.distilled import SyntheticSet
from utils.data.ready import tensors_of
from utils.data.recipe import recipe_of
from utils.measure.record import Entry, read_evaluations
from utils.measure.sets import KERNEL, TrainingSet, own_sets

NO_AUGMENTATION = "none"


@dataclass(frozen=True, eq=False)
class Contents:
    """A set, its numbers as in `tensors_of`, and its recipe with `accuracy`, `measured` and
    `provenance`.
    """

    distilled: SyntheticSet
    tensors: Mapping[str, Tensor]
    recipe: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Contents":
        """Read a set and what lies beside it; UserError where one of them is damaged."""
        distilled = SyntheticSet.load(path)
        try:
            tensors = tensors_of(distilled)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        entries = measured(distilled, path.name, read_evaluations(path.with_name("eval.json")))
        chosen = chosen_evaluation(distilled, entries)
        recipe = recipe_of(distilled, **(settings_of(chosen) if chosen else {}))
        results = {
            "accuracy": summary(chosen) if chosen else None,
            "measured": [summary(entry) for entry in entries],
            "provenance": provenance(distilled, path),
        }
        return cls(distilled, tensors, recipe | results)

    @cached_property
    def images01(self) -> Tensor:
        """The images as pictures (N, C, H, W) in [0, 1]; values outside are clipped."""
        return self.distilled.normalisation.inverse(self.tensors["images"]).clamp(0, 1)

    @property
    def logits(self) -> Tensor:
        """Logits (N, classes) whose softmax is what networks train on; of classes it is exact to
        the last digit of float32.
        """
        form, classes = self.recipe["labels"], len(self.distilled.class_names)
        if form == "logits":
            return self.tensors["soft_labels"]
        if form == "probabilities":
            soft = self.tensors["soft_labels"]
            return soft.clamp_min(torch.finfo(soft.dtype).tiny).log()
        return 50.0 * torch.nn.functional.one_hot(self.tensors["labels"], classes).float()

    def check_protocol(self, what: str) -> None:
        """UserError where networks are not trained on the set by epochs of SGD at one rate, which
        is all that `what` can say.
        """
        kind = self.recipe["training"]["kind"]
        if kind != "epochs":
            raise UserError(
                f"{what} can say one learning rate, and this set has {kind.replace('_', ' ')} of "
                "its own: choose bundle, huggingface, png or npz"
            )


def measured(distilled: SyntheticSet, name: str, entries: Sequence[Entry]) -> list[Entry]:
    """Choose the evaluations in eval.json of exactly these images and labels, on the test images of
    the distillation; a set that was written again under its `name` has other ones.
    """
    return [
        entry
        for entry in entries
        if entry.get("distilled") == name
        and not entry.get("other_test")
        and any(_is_of(each, entry) for each in _own_sets(distilled, entry.get("precision")))
    ]


def _own_sets(distilled: SyntheticSet, precision: str | None = None) -> list[TrainingSet]:
    device, dtype = torch.device("cpu"), storage_dtype(precision)
    return [*own_sets(distilled, device=device, dtype=dtype, hard_labels=True, epochs=1)]


def _is_of(training_set: TrainingSet, entry: Entry) -> bool:
    networks = range(len(entry["accs"]))
    is_named = training_set.name == entry["trained_on"]
    return is_named and training_set.digest(networks) == entry.get("images")


def chosen_evaluation(distilled: SyntheticSet, entries: Sequence[Entry]) -> Entry | None:
    """The one that tells how well the set does: of its own network, in the first way that networks
    are trained on it; augmented as the distillation was, else another, then the longest training,
    the most networks, the latest.
    """
    way = next(each.name for each in _own_sets(distilled) if not each.name.endswith(KERNEL))
    model, config = canonical_name(distilled.model), distilled.config
    dsa = config["dsa_strategy"] if config["dsa"] else None
    alike = [
        (entry.get("dsa") == dsa, entry.get("epochs", 0), len(entry["accs"]), number)
        for number, entry in enumerate(entries)
        if entry["trained_on"] == way and canonical_name(entry["model"]) == model
    ]
    return entries[max(alike)[-1]] if alike else None


def settings_of(entry: Entry) -> dict[str, Any]:
    """The arguments of `recipe_of` that an evaluation says."""
    return {
        "epochs": entry["epochs"],
        "batch_size": entry["batch_train"],
        "dsa_strategy": entry["dsa"] or NO_AUGMENTATION,
    }


def summary(entry: Entry) -> dict[str, Any]:
    """An evaluation in plain values; accuracies are fractions."""
    names = ("trained_on", "model", "lr", "epochs", "batch_train", "dsa", "precision", "seed")
    return {
        "mean": entry["acc_mean"],
        "std": entry["acc_std"],
        "n": len(entry["accs"]),
        **{name: entry.get(name) for name in names},
    }


def provenance(distilled: SyntheticSet, path: Path) -> dict[str, Any]:
    """Say what made the set: command, versions, commit, settings, images; no paths of a machine."""
    data = dict(distilled.data or {})
    data.pop("path", None)
    config = distilled.config
    return {
        "file": path.name,
        "set": distilled.set,
        "iteration": distilled.iteration,
        "environment": _environment(path.with_name("config.yaml")),
        "settings": {n: v for n, v in config.items() if not n.endswith("_path")},
        "data": data,
    }


def _environment(config: Path) -> dict[str, str]:
    """The last environment in a run's config.yaml; empty where there is none."""
    environment: dict[str, str] = {}
    with suppress(OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError):
        environment = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["environment"][-1])
        environment["command"] = without_places(environment["command"])
    return environment


def without_places(command: str) -> str:
    """A command line with the last part alone of absolute paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
    return shlex.join(words)
