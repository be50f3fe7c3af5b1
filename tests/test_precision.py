"""In what precision networks compute: what a device has, and how near bfloat16 comes."""

import pytest
import torch

from networks import build_network
from utils.compute import device as precision
from utils.compute.cohort import Cohort, Recipe
from utils.compute.device import compute_dtype, storage_dtype, use_precision
from utils.compute.flat import FlatNetwork, TrainingNetwork, flatten, without_batch_counts
from utils.core.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def settings():
    """The process-wide settings, put back afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def allowed():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def cpu_with(monkeypatch, *, bf16):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)


@pytest.mark.parametrize("asked", ["fp32", "fp64"])
def test_a_cpu_has_float32_and_float64(asked):
    assert use_precision(asked, CPU) == asked


def test_a_cpu_has_no_tf32(monkeypatch):
    cpu_with(monkeypatch, bf16=False)
    with pytest.raises(UserError) as error:
        use_precision("tf32", CPU)
    assert "--precision tf32" in str(error.value)
    assert str(error.value).endswith("choose fp32, fp64")


def test_bf16_depends_on_the_cpu(monkeypatch):
    cpu_with(monkeypatch, bf16=False)
    with pytest.raises(UserError, match="--precision bf16: this CPU has none; choose fp32, fp64"):
        use_precision("bf16", CPU)
    cpu_with(monkeypatch, bf16=True)
    assert use_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="choose fp32, bf16, fp64"):
        use_precision("tf32", CPU)


def test_this_cpu_can_be_asked_for_bf16():
    """Whatever it answers: the name of the operator is that of this PyTorch."""
    assert precision._is_there("bf16", CPU) in (True, False)


def test_without_a_choice_it_is_that_of_the_field(monkeypatch):
    assert use_precision(None, CPU) == "fp32"
    monkeypatch.setattr(precision, "_is_there", lambda name, device: True)
    assert use_precision(None, CUDA) == "tf32"


@pytest.mark.parametrize(
    ("asked", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp64", False)]
)
def test_products_are_set_for_the_process(monkeypatch, asked, tf32):
    monkeypatch.setattr(precision, "_is_there", lambda name, device: True)
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = not tf32
    use_precision(asked, CUDA)
    assert allowed() == (tf32, tf32)


def test_an_old_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    before = allowed()
    for asked in ("tf32", "bf16"):
        with pytest.raises(UserError, match="this CUDA has none; choose fp32, fp64"):
            use_precision(asked, CUDA)
    assert allowed() == before


def test_types():
    assert storage_dtype("fp64") == torch.float64
    assert {storage_dtype(name) for name in ("fp32", "tf32", "bf16")} == {torch.float32}
    assert compute_dtype("bf16") == torch.bfloat16
    assert {compute_dtype(name) for name in ("fp32", "tf32", "fp64", None)} == {None}


SHAPE = {"channels": 3, "num_classes": 4, "image_size": 8}


def parts(model):
    network = build_network(model, **SHAPE, seed=0)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return network, flatten(network.parameters()).detach(), images


def assert_near(value, reference, *, within=0.05):
    """Within the rounding of bfloat16, but not the same: it did compute in it."""
    error = ((value - reference).norm() / reference.norm()).item()
    assert 1e-5 < error < within


@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetBN", "ConvNetLN", "MLP", "LeNet"])
def test_logits_in_bfloat16_are_near(model):
    network, theta, images = parts(model)
    expected = FlatNetwork(network)(theta, images)
    flat = FlatNetwork(network, dtype=torch.bfloat16)
    logits = flat(theta, images)
    assert logits.dtype == images.dtype == torch.float32
    assert_near(logits, expected)

    def sum_of_squares(theta):
        return flat(theta, images).square().sum()

    g = torch.func.grad(sum_of_squares)(theta)
    assert g.dtype == torch.float32
    _, product = torch.func.jvp(torch.func.grad(sum_of_squares), (theta,), (g,))
    assert product.isfinite().all()


def test_a_network_computes_in_the_type_of_the_images_by_default():
    network, theta, images = parts("ConvNetW32")
    flat = FlatNetwork(network)
    assert flat(theta, images).dtype == torch.float32
    assert flat(theta, images.double()).dtype == torch.float64
    torch.testing.assert_close(flat(theta, images.double()).float(), flat(theta, images))


@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetLN"])
def test_a_training_network_in_bfloat16_is_near(model):
    network, theta, images = parts(model)
    expected, _ = TrainingNetwork(network)(theta, theta.new_empty(0), images)
    training = TrainingNetwork(network, dtype=torch.bfloat16)
    logits, statistics = training(theta, theta.new_empty(0), images)
    assert logits.dtype == statistics.dtype == torch.float32
    assert_near(logits, expected)


def test_weights_stay_in_float32_while_training_in_bfloat16():
    """Layer norm: where instance norm divides by the spread of 2x2 maps, bfloat16 is far off."""
    _, _, images = parts("ConvNetLN")
    trained = {}
    for dtype in (None, torch.bfloat16):
        recipe = Recipe("ConvNetLN", **SHAPE, momentum=0.9, weight_decay=5e-4, dtype=dtype)
        cohort = Cohort(recipe, [0], device=CPU, dtype=torch.float32)
        progress = cohort.train(
            images,
            torch.tensor([0, 1, 2, 3, 0, 1]),
            epochs=4,
            lr=0.01,
            batch_size=4,
            dsa_groups=None,
            generators=[torch.Generator().manual_seed(0)],
        )
        assert progress.losses.dtype == torch.float32
        trained[dtype] = flatten(cohort.networks[0].parameters()).detach()
        assert trained[dtype].dtype == torch.float32
    initial = flatten(recipe.build(0).parameters()).detach()
    assert_near(trained[torch.bfloat16] - initial, trained[None] - initial, within=0.2)


def test_batch_norm_in_bfloat16():
    network, theta, images = parts("ConvNetBN")
    theta = theta.detach()
    statistics = flatten(without_batch_counts(network).buffers())
    logits, after = TrainingNetwork(network, dtype=torch.bfloat16)(theta, statistics, images)
    assert logits.dtype == after.dtype == torch.float32
    assert not torch.equal(after, statistics)
