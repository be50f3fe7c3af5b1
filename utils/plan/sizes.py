"""How many images of what size a call works on, and what trainings that makes."""

from dataclasses import dataclass

from utils.compute.cohort import images_per_test_batch
from utils.compute.cost import FLOAT_BYTES, NetworkCost, Training, inference_bytes, network_cost
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

    def network(self, model: str) -> NetworkCost:
        return network_cost(
            model, channels=self.channels, num_classes=self.classes, image_size=self.image_size
        )

    def experts_training(self, options: BufferOptions) -> Training:
        """That of an expert."""
        cost, batch = self.network(options.model), min(options.batch_train, self.train)
        return Training(cost, self.train, batch, options.train_epochs, options.flat)

    def evaluation_trainings(self, options: DistillOptions) -> list[Training]:
        """Those of an evaluation, one for each architecture."""
        images = self.classes * options.ipc
        batch = min(options.batch_train, images)
        return [
            Training(self.network(model), images, batch, options.epoch_eval_train)
            for model in options.evaluation_models
        ]

    def cohort_bytes(self, training: Training, *, at_once: int) -> int:
        """Memory of training `at_once` networks together, and of testing them one by one."""
        tested = min(self.test, images_per_test_batch(self.image_size))
        testing = at_once * training.vector_bytes + inference_bytes(training.cost, tested)
        return max(at_once * training.bytes, testing)
