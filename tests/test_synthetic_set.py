"""The distilled file, and the images that a distillation starts from."""

import pytest
import torch
from short_runs import digits_set

from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import load_dataset
from utils.data.distilled import SyntheticSet
from utils.data.real_images import class_labels, initial_images, random_real_images


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def whitened_digits():
    return load_dataset("digits", zca=True)


def make_set(data):
    images = torch.randn(10, 1, 8, 8)
    return digits_set(data, images, model="ConvNetD2", set="ema", config={"batch_train": 9})


def test_the_file_explains_itself_to_plain_torch(whitened_digits, tmp_path):
    path = tmp_path / "distilled_best.pt"
    make_set(whitened_digits).save(path, include_whitening=True)
    values = torch.load(path, weights_only=True)
    documented = """
        images labels syn_lr dataset subset model ipc zca mean std class_names iteration set config
    """
    assert set(documented.split()) <= set(values)
    assert values["zca"] is True
    assert values["images"].dtype == torch.float32


@pytest.mark.parametrize("included", [True, False])
def test_the_whitening_is_included_or_left_to_be_fitted(whitened_digits, tmp_path, included):
    path = tmp_path / "distilled_best.pt"
    make_set(whitened_digits).save(path, include_whitening=included)
    normalisation = SyntheticSet.load(path).normalisation
    assert normalisation.zca
    assert normalisation.needs_fit is not included
    if included:
        images = torch.rand(5, 1, 8, 8)
        again = normalisation.inverse(normalisation.forward(images))
        torch.testing.assert_close(again, images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no distilled set at .*/distilled_x\.pt; distill_att\.py writes"),
        ([1, 2], r"distilled_x\.pt is not a distilled set: it holds a list instead of a dict"),
        (torch.zeros(1), "it holds a Tensor instead of a dict"),
        ({}, "it lacks images, labels"),
        ({"images": torch.zeros(1)}, "it lacks labels, syn_lr"),
    ],
)
def test_what_is_no_set_is_named(content, message, tmp_path):
    path = tmp_path / "distilled_x.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        SyntheticSet.load(path)


def test_random_real_images_are_different_training_images_of_their_class(digits):
    images = random_real_images(digits, 4, stream(0, "a"))
    assert images.shape == (40, 1, 8, 8)
    train = digits.require_train()
    pool = {
        tuple(x.flatten().tolist()): int(y) for x, y in zip(train.images, train.labels, strict=True)
    }
    found = [pool[tuple(image.flatten().tolist())] for image in images]
    assert found == class_labels(10, 4, torch.device("cpu")).tolist()
    assert len({tuple(image.flatten().tolist()) for image in images}) == 40
    assert torch.equal(images, random_real_images(digits, 4, stream(0, "a")))
    assert not torch.equal(images, random_real_images(digits, 4, stream(1, "a")))


def test_more_images_than_the_smallest_class_has_are_refused(digits):
    with pytest.raises(UserError, match=r"--ipc 500.*class 0"):
        random_real_images(digits, 500, stream(0, "a"))


def test_initial_images(digits):
    real = initial_images(digits, 2, "real", seed=1)
    noise = initial_images(digits, 2, "noise", seed=1)
    assert real.shape == noise.shape == (20, 1, 8, 8)
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert not torch.equal(real, noise)
