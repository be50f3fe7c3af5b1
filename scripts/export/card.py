"""The card of an exported set, README.md: what it is, how to train on it, what for."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

from scripts.export.contents import Contents
from utils.data.distilled import IMPORTED
from utils.measure.protocol import mean_and_std
from utils.methods.registry import METHODS, title

HUB = {
    "CIFAR10": "uoft-cs/cifar10",
    "CIFAR100": "uoft-cs/cifar100",
    "MNIST": "ylecun/mnist",
    "FashionMNIST": "zalando-datasets/fashion_mnist",
    "SVHN": "ufldl-stanford/svhn",
    "Tiny": "zh-plus/tiny-imagenet",
    "ImageNet": "ILSVRC/imagenet-1k",
}
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
WAYS = {
    "epochs": "SGD in epochs, the rate falls to a tenth at half of them",
    "adam": "Adam, as many steps as the distillation noted",
    "learned_steps": "plain SGD whose steps and rates were learned with the images",
}
IN_TORCH = """```python
import torch
from safetensors.torch import load_file

data = load_file("distilled.safetensors")
images, labels = data["images"], data["labels"]  # float32 (N, C, H, W), int64 (N,)
```"""


def card(contents: Contents, *, how_to_use: str, parquet: str | None = None) -> str:
    """Write the card: the field's tags, then text; `how_to_use` is about the files beside it."""
    head = yaml.safe_dump(front_matter(contents, parquet), sort_keys=False, allow_unicode=True)
    parts = (_what_it_is(contents), how_to_use, _how_to_train(contents), _limits(contents))
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(contents: Contents, parquet: str | None) -> dict[str, Any]:
    """The card's metadata, as Hugging Face reads them."""
    distilled = contents.distilled
    count = len(distilled.images)
    method = distilled.config.get("method", "" if IMPORTED in distilled.config else "att")
    tags = ["dataset-distillation", "dataset-condensation", "synthetic"]
    if method and METHODS[method].needs_experts:
        tags.append("trajectory-matching")
    if method == "att":
        tags.append("arxiv:2407.14245")
    values: dict[str, Any] = {
        "pretty_name": name_of(contents),
        "license": "unknown",
        "task_categories": ["image-classification"],
        "size_categories": [next(size for most, size in SIZES.items() if count < most)],
        "source_datasets": [HUB.get(distilled.dataset, "original")],
        "tags": tags,
    }
    if parquet:
        files = [{"split": "train", "path": parquet}]
        values["configs"] = [{"config_name": f"ipc{distilled.ipc}", "data_files": files}]
    return values


def name_of(contents: Contents) -> str:
    """Such as: CIFAR10 distilled by ATT, 1 image per class."""
    distilled = contents.distilled
    data = " ".join(filter(None, (distilled.dataset, distilled.subset)))
    method = distilled.config.get("method", "")
    with suppress(LookupError):  # sets of other codes do not say
        method = title(distilled.config)
    by, s = f" by {method}" if method else "", "" if distilled.ipc == 1 else "s"
    return f"{data} distilled{by}, {distilled.ipc} image{s} per class"


def accuracy_of(result: Mapping[str, Any]) -> str:
    """Such as: 92.04% ± 0.35% (n=3)."""
    n = result["n"]
    return f"{mean_and_std(100 * result['mean'], 100 * result['std'], n, unit='%')} (n={n})"


def _what_it_is(contents: Contents) -> str:
    distilled, recipe = contents.distilled, contents.recipe
    channels, height, width = recipe["image_shape"]
    soft = "" if recipe["labels"] == "classes" else " and learned soft labels"
    lines = [
        f"# {name_of(contents)}",
        f"{len(distilled.images)} synthetic images ({channels}x{height}x{width}){soft}, "
        f"{distilled.ipc} for each of {len(distilled.class_names)} classes. A network trained on "
        "them alone reaches much of the accuracy that the whole data set gives.",
    ]
    if not recipe["measured"]:
        lines.append("What networks reach on this set has not been measured.")
    else:
        rows = [
            f"| {each['trained_on']} | {each['model']} | {each['epochs']} | {each['dsa'] or 'no'} "
            f"| {accuracy_of(each)} |"
            for each in recipe["measured"]
        ]
        lines.append(
            "Accuracy on the real test images, mean and standard deviation over n networks:\n\n"
            "| trained on | network | epochs | augmentation | accuracy |\n|---|---|---|---|---|\n"
            + "\n".join(rows)
        )
    return "\n\n".join(lines)


def _how_to_train(contents: Contents) -> str:
    recipe = contents.recipe
    training = recipe["training"]
    groups = training.get("augmentation", ())
    lines = [
        "## Training",
        f"`recipe.json` has everything. In short: {WAYS[training['kind']]}; "
        + (
            f"each batch is augmented by one of {', '.join(groups)} (DSA)"
            if groups
            else "no augmentation"
        )
        + f"; network {recipe['network']}.",
        f"**The images are {recipe['space']}, and test images must be too**: in [0, 1] first, then "
        + (
            "`(flat_image - zca_mean) @ zca_matrix`."
            if recipe["space"] == "whitened"
            else "`(image - mean) / std` by channel."
        )
        + " Both are tensors of the set. The pictures are rounded and clipped copies to look at.",
    ]
    if recipe["labels"] != "classes":
        lines.append(
            f"Networks train on the soft labels, `soft_labels` ({recipe['labels']}), not on the "
            "classes. Compare with other sets of soft labels only."
        )
    return "\n\n".join([*lines, *recipe["notes"]])


def _limits(contents: Contents) -> str:
    made = contents.recipe["provenance"]
    environment = made["environment"]
    by = f"`{environment['command']}`" if "command" in environment else "an unrecorded call"
    commit = f", commit {environment['git_commit']}" if "git_commit" in environment else ""
    return (
        "## What it is not for\n\n"
        "The images are made for training classifiers of these classes, with networks like the one "
        "above. They are no sample of the real data: do not estimate statistics, fairness or "
        "privacy from them, and do not test on them. They are derived from the real images, whose "
        "licence and terms apply; `license` above is for whoever publishes this set to fill in.\n\n"
        f"Made by {by}{commit}, iteration {made['iteration']} ({made['set']})."
    )
