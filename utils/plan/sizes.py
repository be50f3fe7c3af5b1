"""How many images of what size a call works on, and what trainings that makes."""

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from utils.compute.cohort import images_per_test_batch
from utils.compute.contract import check_batches
from utils.compute.cost import (
    FLOAT_BYTES,
    NetworkCost,
    Training,
    fitting_models,
    inference_bytes,
    network_cost,
)
from utils.compute.device import default_device, use_precision
from utils.config.resolve import Resolved
from utils.data.dataset import find_dataset
from utils.data.source import Source, SplitName
from utils.options import BufferOptions, DistillOptions


@dataclass(frozen=True)
class DataSize:
    """How many images of what kind a data set has; `val` are held out of the training images."""

    channels: int
    classes: int
    image_size: int
    train: int
    test: int
    val: int = 0

    @classmethod
    def of(cls, source: Source) -> "DataSize":
        splits: tuple[SplitName, ...] = ("train", "test", "val")
        counts = {split: len(source.labels.get(split, ())) for split in splits}
        return cls(source.channels, len(source.class_names), source.image_size, **counts)

    @property
    def values(self) -> int:
        """Numbers of an image."""
        return self.channels * self.image_size**2

    @property
    def matrix_bytes(self) -> int:
        """Bytes of a ZCA matrix."""
        return FLOAT_BYTES * self.values**2

    def float_bytes(self, images: int) -> int:
        """Bytes of `images` in float32."""
        return FLOAT_BYTES * self.values * images

    @property
    def shape(self) -> dict[str, int]:
        """What a network is made for."""
        return {
            "channels": self.channels,
            "num_classes": self.classes,
            "image_size": self.image_size,
        }

    def network(self, model: str) -> NetworkCost:
        return network_cost(model, **self.shape)

    def training(self, model: str, images: int, *, batch: int, epochs: int) -> Training:
        """That of a network `model` on so many images, in batches of at most `batch`.

        UserError where it cannot be trained on one of these batches.
        """
        check_batches(model, images, batch, **self.shape)
        return Training(self.network(model), images, min(batch, images), epochs)

    def experts_training(self, options: BufferOptions) -> Training:
        """That of an expert."""
        training = self.training(
            options.model, self.train, batch=options.batch_train, epochs=options.train_epochs
        )
        if options.by_difficulty is not None:  # of an epoch, on average
            seen = options.by_difficulty.counts(options.train_epochs, [self.train])
            training = replace(training, images=round(fmean(seen)))
        return replace(training, flat=options.flat)

    def evaluation_trainings(self, options: DistillOptions) -> list[Training]:
        """Those of an evaluation, one for each architecture."""
        images, epochs = self.classes * options.ipc, options.epoch_eval_train
        return [
            self.training(model, images, batch=options.batch_train, epochs=epochs)
            for model in fitting_models(options.evaluation_models, **self.shape)[0]
        ]

    def cohort_bytes(self, training: Training, *, at_once: int) -> int:
        """Memory of training `at_once` networks together, and of testing them one by one."""
        tested = min(self.test, images_per_test_batch(self.image_size))
        testing = at_once * training.vector_bytes + inference_bytes(training.cost, tested)
        return max(at_once * training.bytes, testing)


def settle_images(resolved: Resolved[Any]) -> Source:
    """Find the data set of a call, and record in `resolved` the image size and the precision that
    the call leaves open.
    """
    options = resolved.options
    selects = getattr(options, "select", None) == "val"
    precision = use_precision(options.precision, default_device())
    source = find_dataset(
        options.dataset,
        data_path=options.data_path,
        subset=options.subset,
        res=options.res,
        zca=options.zca,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        fit=options.fit,
        splits=("train", "test", "val") if selects else ("train", "test"),
    )
    resolved.set("res", source.image_size, resolved.sources["res"])
    resolved.set("precision", precision, resolved.sources["precision"])
    return source
