"""Upper bounds, in bytes, on what each stage holds in memory and writes to disk.

Pure counts from what `utils/compute/cost.py` counts of a network and from the number of images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.compute.cohort import images_per_test_batch
from utils.compute.cost import (
    FLOAT_BYTES,
    NetworkCost,
    adjoint_bytes,
    full_graph_bytes,
    inference_bytes,
    network_cost,
    training_bytes,
)
from utils.compute.device import storage_dtype
from utils.core.pictures import MIN_SIDE
from utils.data.normalisation import CHUNK
from utils.data.source import Source, SplitName
from utils.methods.trajectory.unroll import KEPT_STEPS
from utils.options import DistillOptions
from utils.plan.run_plan import RunPlan, Workload

# CUDA context and the libraries' workspaces; a guess, not measured.
CONTEXT_BYTES = 10**9
# Of the host, in every process: what the libraries load and keep once they compute, and what the
# compiler takes, most of it in processes of its own. Measured on digits, where the work is small.
STARTED_BYTES, COMPILER_BYTES = 100 * 10**6, 750 * 10**6
# Matrices (D, D), D values an image, that fitting ZCA takes beside two copies of the images: nearly
# all of them are those of the singular value decomposition. Measured for D = 3,072.
ZCA_MATRICES = 16
# Vectors of parameters in a sweep beside those of the steps: target, adjoint, gradient and product,
# the next theta and what it is made from, and the two ends of the segment that is drawn ahead.
SWEEP_VECTORS = 8
# Of all synthetic images: images, moving average, gradient and its last part, momentum, the copy
# before a step, and the augmented ones with their gradient.
IMAGE_COPIES = 8
# Of the features of a class: a copy, what is compared with a point, and the differences.
RULE_COPIES = 3
# Of a sheet: enlarged images, the sheet, its bytes as floats, and those.
PICTURE_COPIES = 4
# What a file of torch.save has beside its tensors, and a picture beside a byte a number.
FILE_BYTES = 3_000
STEP_RECORD_BYTES, EVALUATION_RECORD_BYTES = 160, 2_000  # in metrics.jsonl; in eval.json
BOTH: tuple[SplitName, ...] = ("train", "test")
LAST_TAGS, BEST_TAGS = ("last", "ema_last"), ("best", "ema_best")


@dataclass(frozen=True)
class DataSize:
    """How many images of what kind a data set has."""

    channels: int
    classes: int
    image_size: int
    train: int
    test: int
    val: int = 0  # held out of the training images

    @classmethod
    def of(cls, source: Source) -> "DataSize":
        counts = {split: len(labels) for split, labels in source.labels.items()}
        return cls(
            source.channels,
            len(source.class_names),
            source.image_size,
            counts.get("train", 0),
            counts["test"],
            counts.get("val", 0),
        )

    @property
    def values(self) -> int:
        """Numbers of an image."""
        return self.channels * self.image_size**2

    @property
    def matrix_bytes(self) -> int:
        """Bytes of a ZCA matrix."""
        return FLOAT_BYTES * self.values**2

    def images(self, split: SplitName) -> int:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def decoded(self, split: SplitName) -> int:
        """How many images are decoded where `split` is; those held out are among the others."""
        return self.train + self.val if split == "train" else self.images(split)

    def float_bytes(self, images: int) -> int:
        """Bytes of so many images in float32."""
        return FLOAT_BYTES * self.values * images

    def network(self, model: str) -> NetworkCost:
        return network_cost(
            model,
            channels=self.channels,
            num_classes=self.classes,
            image_size=self.image_size,
        )

    def workload(self, options: DistillOptions, *, world: int = 1) -> Workload:
        return Workload.of(
            options,
            channels=self.channels,
            num_classes=self.classes,
            image_size=self.image_size,
            world=world,
        )


def cohort_bytes(cost: NetworkCost, size: DataSize, *, batch: int, at_once: int) -> int:
    """Of training so many networks in step, each on batches of `batch` images, and of testing
    them.
    """
    tested = min(size.test, images_per_test_batch(size.image_size))
    trained = at_once * training_bytes(cost, 0)  # the networks as they are tested
    return max(at_once * training_bytes(cost, batch), trained + inference_bytes(cost, tested))


def choosing_bytes(cost: NetworkCost, size: DataSize, *, features: int, largest: int) -> int:
    """Of an expert that describes all training images by `features` numbers each, or by logits and
    answers, and of a rule at work on the `largest` class.
    """
    tested = min(size.train, images_per_test_batch(size.image_size))
    looking = 2 * FLOAT_BYTES * cost.parameters + inference_bytes(cost, tested)
    kept = max(features, 2 * size.classes) * size.train
    return FLOAT_BYTES * kept + max(looking, RULE_COPIES * FLOAT_BYTES * features * largest)


def distilling_bytes(
    options: DistillOptions, size: DataSize, work: Workload, how: RunPlan, *, vectorised: bool
) -> int:
    """Of the images with all that belongs to them, and the larger of an outer step and an
    evaluation. `vectorised`: students are computed together, as on CUDA.
    """
    images = size.classes * options.ipc
    takes_turns = [matching_bytes(options.syn_steps, work, how, vectorised=vectorised)]
    if options.eval_it > 0:
        batch = min(options.batch_train, images)
        takes_turns += [
            cohort_bytes(cost, size, batch=batch, at_once=how.eval_at_once)
            for cost in work.evaluation_costs
        ]
    return IMAGE_COPIES * size.float_bytes(images) + max(takes_turns)


def matching_bytes(syn_steps: int, work: Workload, how: RunPlan, *, vectorised: bool) -> int:
    """Of the two sweeps of an outer step, or of the graph over all steps."""
    if how.unroll == "autograd":
        return work.students * full_graph_bytes(work.cost, syn_steps=syn_steps, batch=work.batch)
    stride = -(-syn_steps // KEPT_STEPS)
    again = stride if stride > 1 else 0  # parameters of a block, computed again
    vectors = syn_steps // stride + again + SWEEP_VECTORS
    together = work.students if vectorised else 1
    kept = work.students * vectors * FLOAT_BYTES * work.cost.parameters
    return kept + adjoint_bytes(work.cost, together * how.micro_batch)


def gpu_bytes(data: int, work: int) -> int:
    """What a process takes on a CUDA device with so many bytes of data and of work."""
    return CONTEXT_BYTES + data + work


def experts_bytes(expert: int, numbers: Iterable[int], *, per_file: int) -> int:
    """Disk for the experts `numbers`, of `expert` bytes each, at the most: when one is added to a
    file, those before it are there twice.
    """
    return expert * max((i + n % per_file for i, n in enumerate(numbers, 1)), default=0)


def run_bytes(
    options: DistillOptions,
    size: DataSize,
    *,
    iteration: int = -1,
    there: Iterable[str] = (),
) -> tuple[int, int]:
    """Disk of a run directory from `iteration` on (-1: from the start): what is still to be written
    and kept, and the largest file once more while it is replaced.

    `there` are the tags whose sets are there; these and the checkpoint are only replaced.
    """
    images = size.classes * options.ipc
    pixels, labels = size.float_bytes(images), 8 * images
    one = pixels + labels + size.values * images + 2 * FILE_BYTES
    tagged = one + size.matrix_bytes * options.zca
    checkpoint = 3 * wideness(options.precision) * pixels + FILE_BYTES
    log = STEP_RECORD_BYTES * options.Iteration
    begun = iteration >= 0
    tags = {*LAST_TAGS, *(BEST_TAGS if options.eval_it > 0 else ())}.difference(there)
    steps_left = max(0, options.Iteration - max(iteration, 0))
    written = _sets_left(options, iteration) * one + len(tags) * tagged
    written += STEP_RECORD_BYTES * steps_left + (0 if begun else checkpoint)
    return written, max(tagged, checkpoint, log * begun)


def _sets_left(options: DistillOptions, iteration: int) -> int:
    """The first one, and those of the multiples of save_it behind `iteration`."""
    every = options.sets_it
    if every == 0:
        return int(iteration < 0)
    return max(0, options.Iteration // every - iteration // every)


def reading_bytes(
    source: Source,
    read: Sequence[SplitName],
    *,
    kept: Sequence[SplitName],
    zca: bool,
    fits: bool,
    wide: int,
) -> int:
    """The host's memory at the most while the splits `read` are read, those `kept` normalised, and
    ZCA is fitted where it `fits`. Pixels that are not from pictures lie in memory already.
    """
    size = DataSize.of(source)
    pixels = sum(size.values * size.decoded(split) for split in read if split in source.decoded)
    fitting = 2 * size.float_bytes(size.train) + ZCA_MATRICES * size.matrix_bytes if fits else 0
    seen = sum(size.float_bytes(size.images(split)) for split in kept)
    chunk = 3 * size.float_bytes(min(CHUNK, max(size.images(split) for split in kept)))
    widened = (1 + wide) * seen if wide > 1 else 0
    after = size.matrix_bytes * zca + max(pixels + seen + chunk, widened)
    return max(pixels + fitting, after)


def fits_zca(source: Source, *, zca: bool) -> bool:
    """Whether a whitening has to be fitted, none being kept from before."""
    return zca and not (source.zca_cache and source.zca_cache.exists())


def cache_bytes(source: Source, read: Sequence[SplitName], *, fits: bool) -> int:
    """Disk for what is derived from the splits `read` and kept: decoded pixels, the whitening."""
    size = DataSize.of(source)
    decoded = [
        size.values * size.decoded(split)
        for split, path in source.decoded.items()
        if split in read and not path.exists()
    ]
    return sum(decoded) + size.matrix_bytes * fits


def picture_bytes(size: DataSize, ipc: int) -> int:
    """Of the host, while a sheet of all synthetic images is made."""
    enlarged = max(1, MIN_SIDE // size.image_size) ** 2
    return PICTURE_COPIES * enlarged * size.float_bytes(size.classes * ipc)


def wideness(precision: str | None) -> int:
    """How many times wider than float32 images and parameters are."""
    return storage_dtype(precision or "").itemsize // FLOAT_BYTES
