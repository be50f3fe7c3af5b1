"""Look at a folder of pictures and at how fast this machine trains on such: all before the work."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import buffer
from scripts.folder.choose import Found, Speed
from utils.compute.cohort import Cohort, Recipe
from utils.compute.cost import GRADIENT_PASSES, network_cost
from utils.compute.device import default_device
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.augment import DSA_STRATEGY, active_groups
from utils.data.folders import IMAGE_SUFFIXES
from utils.data.source import Source
from utils.plan.experts import ExpertsCall
from utils.plan.machine import Machine
from utils.plan.sizes import DataSize, settle_images

TEST_FRACTION = "0.2"
SAMPLED = 200  # pictures whose size is looked at
TIMED = (4, 32)  # images of the batches that are timed
REPEATS = 5


def find_flags(path: Path) -> list[str]:
    """The flags by which the three scripts find the pictures in `path`; without a folder of test
    images a part is held out.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one with train/<class>/* and test/<class>/*")
    flags = ["--dataset", "folder", "--data_path", str(path)]
    if not any((path / name).is_dir() for name in ("test", "val")):
        flags += ["--test_fraction", TEST_FRACTION]
    return flags


def find_source(flags: Sequence[str]) -> Source:
    """Find the pictures; UserError where there are none, or of one class alone."""
    return settle_images(buffer.parse(list(flags)))


def describe(source: Source, path: Path) -> Found:
    train = source.labels["train"]
    return Found(
        classes=len(source.class_names),
        channels=source.channels,
        train=len(train),
        test=len(source.labels["test"]),
        smallest_class=int(train.bincount(minlength=len(source.class_names)).min()),
        short_side=short_side(path),
    )


def short_side(path: Path) -> int:
    """The median of the short sides of some of the pictures, in pixels."""
    files = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    files = sorted(file for file in files if ".cache" not in file.parts)
    sides = []
    for file in files[:: max(1, len(files) // SAMPLED)]:
        try:
            with Image.open(file) as picture:
                sides.append(min(picture.size))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # what cannot be read is named when all are decoded
    return sorted(sides)[len(sides) // 2] if sides else 32


def measure_speed(found: Found, model: str, res: int) -> Speed:
    """Time training steps of a network on images of noise, in a small and a larger batch."""
    seconds = [_step_seconds(found, model, res, images) for images in TIMED]
    shape = {"channels": found.channels, "num_classes": found.classes, "image_size": res}
    flop = [GRADIENT_PASSES * images * network_cost(model, **shape).flop for images in TIMED]
    per_flop = max((seconds[1] - seconds[0]) / (flop[1] - flop[0]), 0.2 * seconds[1] / flop[1])
    return Speed(1 / per_flop, max(0.0, seconds[0] - flop[0] * per_flop))


def _step_seconds(found: Found, model: str, res: int, images: int) -> float:
    device = default_device()
    recipe = Recipe(
        model,
        channels=found.channels,
        num_classes=found.classes,
        image_size=res,
        momentum=0.0,
        weight_decay=0.0,
    )
    cohort = Cohort(recipe, [0], device=device, dtype=torch.float32)
    x = torch.randn(images, found.channels, res, res, device=device)
    y = torch.arange(images, device=device) % found.classes
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        trained = cohort.train(
            x,
            y,
            epochs=2,
            lr=0.01,
            batch_size=images,
            dsa_groups=active_groups(dsa=True, strategy=DSA_STRATEGY),
            generators=[stream(0, "minibatch", 0)],
        )
        trained.losses.tolist()  # waits for a GPU
        seconds.append((time.perf_counter() - began) / 2)
    return statistics.median(seconds[1:])  # the first one warms up


def measure_epoch(flags: Sequence[str], model: str, source: Source) -> float:
    """Time an epoch of an expert on the pictures themselves."""
    epochs = ["--num_experts", "1", "--train_epochs", str(REPEATS + 1)]
    options = buffer.parse([*flags, "--model", model, *epochs, "--compile", "off"]).options
    call = ExpertsCall.planned(
        options, DataSize.of(source), [0], Machine.here(default_device()).imagined()
    )
    with tempfile.TemporaryDirectory() as folder:
        training = buffer.trainer(call, source, Path(folder))([0])
        seconds = []
        while not training.is_finished:
            began = time.perf_counter()
            training.epoch()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
