"""Standardisation and ZCA: what they compute, that they can be undone, stored and refused."""

import pytest
import torch
from kornia.enhance import ZCAWhitening

from utils.core.errors import UserError
from utils.data import normalisation as module
from utils.data.normalisation import Normalisation, check_zca_size, fit_mean_std, fit_zca


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth random images in [0, 1], float64, (200, 3, 6, 6)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(200, 3, 3, 3, generator=generator, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=(6, 6), mode="bilinear")


def test_mean_and_std_are_taken_off_channel_by_channel():
    half_grey = torch.full((1, 2, 1, 1), 0.5)
    seen = Normalisation(mean=(0.5, 0.25), std=(2.0, 0.5)).forward(half_grey)
    assert seen.flatten().tolist() == [0.0, 0.5]


def test_mean_and_std_are_undone(images):
    normalisation = Normalisation(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    torch.testing.assert_close(normalisation.inverse(normalisation.forward(images)), images)


def test_measured_mean_and_std_are_those_of_the_pixels():
    pixels = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8)
    measured = fit_mean_std(pixels)
    units = pixels.double() / 255
    assert measured.mean == pytest.approx(units.mean(dim=(0, 2, 3)).tolist())
    assert measured.std == pytest.approx(units.std(dim=(0, 2, 3), correction=0).tolist())


def test_a_constant_channel_stays_finite():
    pixels = torch.full((4, 1, 2, 2), 7, dtype=torch.uint8)
    seen = fit_mean_std(pixels).forward(pixels.float() / 255)
    torch.testing.assert_close(seen, torch.zeros(4, 1, 2, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_zca_is_undone(images, dtype, tolerance):
    images = images.to(dtype)
    zca = fit_zca(images)
    seen = zca.forward(images)
    assert seen.shape == images.shape and seen.dtype == dtype
    assert (seen - images).abs().max() > 0.1
    torch.testing.assert_close(zca.inverse(seen), images, atol=tolerance, rtol=0)


def test_zca_whitens(images):
    """The covariance C becomes C (C + eps I)^-1: 1 along strong directions, 0 along weak ones."""
    covariance = images.flatten(1).T.cov()
    whitened = fit_zca(images).forward(images).flatten(1).T
    eye = torch.eye(len(covariance), dtype=torch.float64)
    torch.testing.assert_close(
        whitened.cov(), covariance @ torch.linalg.inv(covariance + 0.1 * eye)
    )
    assert whitened.mean(1).abs().max() < 1e-12


def test_zca_is_kornias(images):
    images = images.float()
    zca, kornia = fit_zca(images), ZCAWhitening(eps=0.1, compute_inv=True).fit(images)
    torch.testing.assert_close(zca.forward(images), kornia(images))
    torch.testing.assert_close(
        zca.inverse(images), kornia.inverse_transform(images), atol=1e-5, rtol=1e-5
    )


def test_other_images_than_the_fitted_ones_are_whitened_by_the_stored_matrix(images):
    zca = fit_zca(images[:100])
    expected = (images[100:].flatten(1) - images[:100].flatten(1).mean(0)) @ zca.zca_matrix
    torch.testing.assert_close(zca.forward(images[100:]).flatten(1), expected)


def test_chunks_change_nothing(images, monkeypatch):
    zca = fit_zca(images)
    whole = zca.forward(images)
    monkeypatch.setattr(module, "CHUNK", 7)
    torch.testing.assert_close(zca.forward(images), whole)
    torch.testing.assert_close(zca.inverse(whole), images)


def test_a_file_brings_everything_back(images, tmp_path):
    zca = fit_zca(images)
    torch.save({"syn_lr": 0.01, **zca.to_dict()}, tmp_path / "set.pt")
    back = Normalisation.from_dict(torch.load(tmp_path / "set.pt", weights_only=True))
    assert (back.mean, back.std, back.zca, back.needs_fit) == (zca.mean, zca.std, True, False)
    assert torch.equal(back.forward(images), zca.forward(images))

    plain = Normalisation((0.1,), (0.2,))
    back = Normalisation.from_dict(plain.to_dict())
    assert (back.mean, back.std, back.zca, back.needs_fit) == ((0.1,), (0.2,), False, False)


def test_the_whitening_can_be_left_out_and_is_then_missed(images):
    values = fit_zca(images).to_dict(include_whitening=False)
    assert not any(isinstance(value, torch.Tensor) for value in values.values())
    back = Normalisation.from_dict(values)
    assert back.zca and back.needs_fit
    with pytest.raises(UserError, match="no whitening"):
        back.forward(images)
    with pytest.raises(UserError, match="no whitening"):
        back.inverse(images)


def test_a_matrix_too_large_is_refused_with_its_size():
    check_zca_size(3, 64, 64)
    with pytest.raises(UserError, match=r"128x128 images with 3 channels needs .* 9\.7 GB"):
        fit_zca(torch.empty(2, 3, 128, 128))


def test_one_image_is_too_few_for_zca():
    with pytest.raises(UserError, match="at least 2 training images, got 1"):
        fit_zca(torch.rand(1, 1, 2, 2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_another_device_than_the_matrix(images):
    zca = fit_zca(images)
    seen = zca.forward(images.cuda())
    assert seen.is_cuda
    torch.testing.assert_close(zca.inverse(seen).cpu(), images)
