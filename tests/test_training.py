"""Training and evaluation against loops written by hand, and the protocol they follow."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils.compute import batches
from utils.compute import cohort as training
from utils.compute.cohort import Cohort, Progress, Recipe, accuracy
from utils.compute.execution import PLAIN, Execution
from utils.core.rng import derive_seed, stream
from utils.data import augment
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import Split
from utils.measure import protocol as evaluation
from utils.measure.protocol import Accuracies, EvalExecution, Protocol, evaluate

DSA = parse_strategy(DSA_STRATEGY)
VECTORISED = Execution(vectorised=True)
CPU = torch.device("cpu")
MODELS = ["ConvNetW32", "ConvNetBN", "ResNet18"]


def stripes(count: int, seed: int, noise: float = 0.3, size: int = 8) -> Split:
    """Images of two classes, horizontal and vertical stripes, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    horizontal = torch.tensor([1.0, -1.0]).repeat(size // 2)[:, None].expand(size, size)
    clean = torch.stack([horizontal, horizontal.T])[labels][:, None]
    return Split(clean + noise * torch.randn(clean.shape, generator=generator), labels)


def in_float64(data: Split) -> Split:
    return Split(data.images.double(), data.labels)


DATA = in_float64(stripes(10, seed=0, noise=2.0))
FEW = in_float64(stripes(3, seed=0, noise=2.0, size=10))
# Calls of train: epochs and learning rate.
CALLS = ((2, 0.05), (1, 0.02))


def extent_of(model: str) -> tuple[Split, tuple[tuple[int, float], ...]]:
    """Data and calls; ResNet18 is slow, and takes one step only, on images that it fits."""
    return (FEW, ((1, 0.05),)) if model == "ResNet18" else (DATA, CALLS)


def make_recipe(model: str = "ConvNetW32", execution: Execution = PLAIN, **changes) -> Recipe:
    settings = {"momentum": 0.9, "weight_decay": 5e-4} | changes
    size = extent_of(model)[0].images.shape[-1]
    return Recipe(
        model, channels=1, num_classes=2, image_size=size, execution=execution, **settings
    )


def make_cohort(recipe: Recipe, seeds: list[int], device: torch.device = CPU) -> Cohort:
    return Cohort(recipe, seeds, device=device, dtype=torch.float64)


def train(
    cohort: Cohort,
    images: Tensor,
    labels: Tensor,
    *,
    seeds: list[int],
    calls: tuple[tuple[int, float], ...] = CALLS,
    dsa_groups: tuple[str, ...] | None = DSA,
) -> list[Progress]:
    generators = [torch.Generator().manual_seed(100 + seed) for seed in seeds]
    return [
        cohort.train(
            images,
            labels,
            epochs=epochs,
            lr=lr,
            batch_size=4,
            dsa_groups=dsa_groups,
            generators=generators,
        )
        for epochs, lr in calls
    ]


def train_by_hand(
    network: nn.Module,
    data: Split,
    rates: list[float],
    rng: torch.Generator,
    *,
    dsa_groups: tuple[str, ...] | None,
    momentum: float,
    weight_decay: float,
) -> list[tuple[float, float]]:
    """For each epoch its learning rate; returns each epoch's mean loss and accuracy."""
    network.train()
    params = list(network.parameters())
    momenta = [torch.zeros_like(param) for param in params]
    progress = []
    for lr in rates:
        loss, hits = 0.0, 0
        for batch in torch.randperm(len(data.labels), generator=rng).split(4):
            x, y = data.images[batch], data.labels[batch]
            if dsa_groups is not None:
                x = augment.apply(x, augment.draw(dsa_groups, len(batch), rng))
            logits = network(x)
            each = F.cross_entropy(logits, y, reduction="none")
            loss += each.sum().item()
            hits += int((logits.argmax(1) == y).sum())
            gradients = torch.autograd.grad(each.mean(), params)
            with torch.no_grad():
                for param, v, g in zip(params, momenta, gradients, strict=True):
                    v.mul_(momentum).add_(g + weight_decay * param)
                    param -= lr * v
        progress.append((loss / len(data.labels), hits / len(data.labels)))
    return progress


def state_of(network: nn.Module) -> list[Tensor]:
    """Weights, then running statistics."""
    statistics = [value for value in network.buffers() if value.is_floating_point()]
    return [*(param.detach() for param in network.parameters()), *statistics]


def assert_same_networks(network: nn.Module, other: nn.Module, tolerance: float) -> None:
    for a, b in zip(state_of(network), state_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_training_is_the_loop_written_by_hand(model):
    """Order, augmentation, momentum (which carries over between the calls) and weight decay."""
    data, calls = extent_of(model)
    cohort = make_cohort(make_recipe(model), [7])
    progress = train(cohort, data.images, data.labels, seeds=[7], calls=calls)

    by_hand = make_recipe(model).build(7).double()
    rates = [lr for epochs, lr in calls for _ in range(epochs)]
    by_epoch = train_by_hand(
        by_hand,
        data,
        rates,
        torch.Generator().manual_seed(107),
        dsa_groups=DSA,
        momentum=0.9,
        weight_decay=5e-4,
    )
    assert_same_networks(cohort.networks[0], by_hand, 1e-9)
    for call, (epochs, _) in zip(progress, calls, strict=True):
        own, by_epoch = by_epoch[:epochs], by_epoch[epochs:]
        loss, acc = (sum(column) / epochs for column in zip(*own, strict=True))
        assert call.losses.tolist() == pytest.approx([loss], rel=1e-9)
        assert call.accuracies.tolist() == pytest.approx([acc])


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "dsa_groups"), [(0.0, 0.0, None), (0.5, 0.1, None)]
)
def test_the_recipe_is_followed(momentum, weight_decay, dsa_groups):
    recipe = make_recipe(momentum=momentum, weight_decay=weight_decay)
    cohort = make_cohort(recipe, [3])
    train(cohort, DATA.images, DATA.labels, seeds=[3], dsa_groups=dsa_groups)
    by_hand = recipe.build(3).double()
    train_by_hand(
        by_hand,
        DATA,
        [0.05, 0.05, 0.02],
        torch.Generator().manual_seed(103),
        dsa_groups=dsa_groups,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    assert_same_networks(cohort.networks[0], by_hand, 1e-9)


def alone(model: str, seed: int, images: Tensor | None = None) -> tuple[nn.Module, list[Progress]]:
    data, calls = extent_of(model)
    cohort = make_cohort(make_recipe(model), [seed])
    seen = data.images if images is None else images
    progress = train(cohort, seen, data.labels, seeds=[seed], calls=calls)
    return cohort.networks[0], progress


@pytest.mark.parametrize(
    ("model", "execution", "tolerance"),
    [
        ("ConvNetW32", PLAIN, 0.0),
        ("ConvNetBN", PLAIN, 0.0),
        *((model, VECTORISED, 1e-9) for model in MODELS),
        ("ConvNetW32", Execution(winograd=True), 1e-9),
    ],
)
def test_networks_that_train_in_step_are_those_that_train_alone(model, execution, tolerance):
    """Row by row to the last bit; together (vmap) up to rounding."""
    data, calls = extent_of(model)
    seeds = [3, 4] if model == "ResNet18" else [3, 4, 5]
    singles = [alone(model, seed) for seed in seeds]
    cohort = make_cohort(make_recipe(model, execution), seeds)
    together = train(cohort, data.images, data.labels, seeds=seeds, calls=calls)
    for network, (single, _) in zip(cohort.networks, singles, strict=True):
        assert_same_networks(network, single, tolerance)
    for call, progress in enumerate(together):
        for name in ("losses", "accuracies"):
            separate = torch.cat([getattr(steps[call], name) for _, steps in singles])
            torch.testing.assert_close(
                getattr(progress, name), separate, rtol=tolerance, atol=tolerance
            )
    losses = together[0].losses.tolist()
    assert len(set(losses)) == len(seeds)


def test_running_statistics_are_trained():
    network, _ = alone("ConvNetBN", 3)
    fresh = make_recipe("ConvNetBN").build(3).double()
    statistics = [name for name, _ in network.named_buffers()]
    assert len(statistics) == 6
    for name in statistics:
        assert not torch.equal(network.get_buffer(name), fresh.get_buffer(name)), name


@pytest.mark.parametrize("execution", [PLAIN, VECTORISED], ids=["one by one", "vmap"])
def test_each_network_may_see_its_own_images(execution):
    images = torch.stack([DATA.images, DATA.images.flip(2) + 0.5, 2 * DATA.images])
    seeds = [3, 4, 5]
    cohort = make_cohort(make_recipe(execution=execution), seeds)
    train(cohort, images, DATA.labels, seeds=seeds)
    tolerance = 1e-9 if execution.vectorised else 0.0
    for network, seed, own in zip(cohort.networks, seeds, images, strict=True):
        assert_same_networks(network, alone("ConvNetW32", seed, own)[0], tolerance)


def test_how_many_batches_are_made_together_does_not_matter(monkeypatch):
    expected, _ = alone("ConvNetW32", 3)
    made = []
    images = batches.Batches.images
    monkeypatch.setattr(
        batches.Batches, "images", lambda self, x: made.append(1) or images(self, x)
    )
    alone("ConvNetW32", 3)
    assert len(made) == 2  # one block a call
    made.clear()
    two_steps = 2 * 4 * 64 * 8  # of four float64 images
    monkeypatch.setitem(batches.BLOCK_BYTES, "cpu", two_steps)
    assert_same_networks(alone("ConvNetW32", 3)[0], expected, 0.0)
    assert len(made) == 3 + 2


def test_several_steps_may_be_taken_in_one_call(monkeypatch):
    """As CUDA graphs capture them; the losses and answers on the way count the same."""
    expected, progress = alone("ConvNetW32", 3)
    taken = []  # steps in each call
    monkeypatch.setattr(
        Execution,
        "capture",
        lambda self, step: lambda *inputs: taken.append((len(inputs) - 6) // 2) or step(*inputs),
    )
    cohort = make_cohort(make_recipe(execution=Execution(cuda_graphs="on")), [3])
    found = train(cohort, DATA.images, DATA.labels, seeds=[3])
    assert max(taken) > 1
    assert_same_networks(cohort.networks[0], expected, 0.0)
    for mine, theirs in zip(found, progress, strict=True):
        assert torch.equal(mine.accuracies, theirs.accuracies)
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-12, atol=0)


def test_networks_hold_the_weights_before_and_after():
    seeds = [3, 4]
    cohort = make_cohort(make_recipe("ConvNetBN"), seeds)
    for network, seed in zip(cohort.networks, seeds, strict=True):
        assert_same_networks(network, make_recipe("ConvNetBN").build(seed).double(), 0.0)
    held = [list(network.parameters()) for network in cohort.networks]
    train(cohort, DATA.images, DATA.labels, seeds=seeds)
    for network, seed, params in zip(cohort.networks, seeds, held, strict=True):
        assert all(a is b for a, b in zip(network.parameters(), params, strict=True))
        assert_same_networks(network, alone("ConvNetBN", seed)[0], 0.0)
        assert all(param.dtype == torch.float64 for param in params)
        assert all(value.dtype == torch.float64 for value in network.buffers())


def test_training_leaves_images_and_the_global_generator_alone():
    images, before = DATA.images.clone(), torch.get_rng_state()
    progress = train(make_cohort(make_recipe(), [3]), images, DATA.labels, seeds=[3])[0]
    assert torch.equal(images, DATA.images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not progress.losses.requires_grad


def test_progress_counts_images_not_batches():
    """With a rate of zero: the mean over all images, though the last batch has 2 of 4."""
    recipe = make_recipe(weight_decay=0.0)
    cohort = make_cohort(recipe, [3, 4])
    progress = cohort.train(
        DATA.images,
        DATA.labels,
        epochs=3,
        lr=0.0,
        batch_size=4,
        dsa_groups=None,
        generators=[torch.Generator().manual_seed(j) for j in range(2)],
    )
    assert progress.losses.shape == progress.accuracies.shape == (2,)
    for j, seed in enumerate((3, 4)):
        network = recipe.build(seed).double()
        loss = F.cross_entropy(network(DATA.images), DATA.labels)
        assert progress.losses[j].item() == pytest.approx(loss.item(), rel=1e-9)
        expected = accuracy(network, DATA.images, DATA.labels)
        assert progress.accuracies[j].item() == pytest.approx(expected)


def test_a_step_is_prepared_once_a_recipe():
    step = training._training_steps(make_recipe("ConvNetBN"), 2)
    assert training._training_steps(make_recipe("ConvNetBN"), 2) is step
    assert training._training_steps(make_recipe("ConvNetBN"), 3) is not step
    assert training._training_steps(make_recipe("ConvNetBN", momentum=0.5), 2) is not step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "vectorised"), [("ConvNetW32", False), ("ConvNetBN", False), ("ConvNetBN", True)]
)
def test_compiled_steps_train_the_same(model, vectorised):
    execution = Execution(compiled=True, vectorised=vectorised)
    cohort = make_cohort(make_recipe(model, execution), [3, 4])
    train(cohort, DATA.images, DATA.labels, seeds=[3, 4])
    for network, seed in zip(cohort.networks, (3, 4), strict=True):
        assert_same_networks(network, alone(model, seed)[0], 1e-9)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetBN"])
def test_a_cuda_device_trains_the_same(model, compiled, cuda_graphs):
    device = torch.device("cuda")
    execution = Execution.on(device, compiled=compiled, cuda_graphs=cuda_graphs)
    cohort = make_cohort(make_recipe(model, execution), [3, 4], device)
    train(cohort, DATA.images.to(device), DATA.labels.to(device), seeds=[3, 4])
    for network, seed in zip(cohort.networks, (3, 4), strict=True):
        assert_same_networks(network.cpu(), alone(model, seed)[0], 1e-9)


class Fixed(nn.Module):
    """Takes the images (N, classes, 1, 1) for logits and notes the mode and size of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[bool, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append((self.training, len(images)))
        return images.flatten(1)


def test_accuracy_counts_in_eval_mode_over_a_short_last_batch():
    predictions = torch.tensor([0, 1, 2, 2, 1])
    images = F.one_hot(predictions, 3).float().view(5, 3, 1, 1)
    network = Fixed()
    assert accuracy(network, images, torch.tensor([0, 1, 2, 0, 0]), batch_size=2) == 3 / 5
    assert network.batches == [(False, 2), (False, 2), (False, 1)]


def run(
    data: Split,
    test: Split,
    *,
    num_eval: int = 1,
    epochs: int = 4,
    seed: int = 0,
    lr: float = 0.05,
    dsa_groups: tuple[str, ...] | None = DSA,
    images: Tensor | list[Tensor] | None = None,
    how: EvalExecution = EvalExecution(),  # noqa: B008
) -> Accuracies:
    return evaluate(
        data.images if images is None else images,
        data.labels,
        test,
        num_classes=2,
        model="ConvNetW32",
        lr=lr,
        protocol=Protocol(num_eval, epochs, batch_size=4, dsa_groups=dsa_groups),
        seed=seed,
        run=how,
    )


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(1, [0.05]), (4, [0.05, 0.05, 0.005, 0.005]), (3, [0.05, 5e-3, 5e-3])],
)
def test_evaluation_follows_the_protocol_of_the_field(monkeypatch, epochs, rates):
    data, test = in_float64(stripes(6, seed=0)), in_float64(stripes(4, seed=1))
    measured = []

    def spy(network, images):
        measured.append((network, images))
        return 1 - test.labels

    monkeypatch.setattr(evaluation, "answers", spy)
    assert run(data, test, num_eval=2, epochs=epochs, seed=9).accs == (0, 0)

    assert len(measured) == 2
    for k, (network, images) in enumerate(measured):
        assert images is test.images
        by_hand = build_network(
            "ConvNetW32", channels=1, num_classes=2, image_size=8, seed=derive_seed(9, "init", k)
        ).double()
        rng = stream(9, "minibatch", k)
        train_by_hand(by_hand, data, rates, rng, dsa_groups=DSA, momentum=0.9, weight_decay=5e-4)
        assert_same_networks(network, by_hand, 1e-9)


def test_test_images_are_not_augmented(monkeypatch):
    """Without an epoch the accuracy is that of the initial network on the images as they are."""
    test = stripes(200, seed=1, noise=3.0)
    augmented = []
    apply = augment.apply
    monkeypatch.setattr(
        augment, "apply", lambda x, draw: augmented.append(len(x)) or apply(x, draw)
    )
    data = stripes(6, seed=0)
    network = build_network(
        "ConvNetW32", channels=1, num_classes=2, image_size=8, seed=derive_seed(3, "init", 0)
    )
    assert run(data, test, epochs=0, seed=3).accs == (accuracy(network, test.images, test.labels),)
    assert augmented == []
    run(data, test, epochs=2)
    assert sum(augmented) == 2 * 6


NOISY = stripes(100, seed=1, noise=3.0)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_how_many_train_at_once_does_not_matter(at_once):
    data = stripes(8, seed=0)
    singly = [run(data, NOISY, num_eval=n).accs for n in (1, 5)]
    assert singly[1][:1] == singly[0]
    assert len(set(singly[1])) > 2
    assert run(data, NOISY, num_eval=5, how=EvalExecution(at_once=at_once)).accs == singly[1]


def test_networks_that_are_computed_together_are_measured_alike():
    data, test = in_float64(stripes(8, seed=0)), in_float64(NOISY)
    together = run(data, test, num_eval=3, how=EvalExecution(at_once=2, execution=VECTORISED))
    assert together == run(data, test, num_eval=3)


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_network_may_have_its_own_set(at_once):
    data = stripes(8, seed=0)
    sets = [data.images, stripes(8, seed=5).images, -data.images]
    own = run(data, NOISY, num_eval=3, images=sets, how=EvalExecution(at_once=at_once)).accs
    for k, images in enumerate(sets):
        assert run(data, NOISY, num_eval=3, images=images).accs[k] == own[k]
    assert own != run(data, NOISY, num_eval=3).accs


def test_a_network_does_not_depend_on_how_many_there_are():
    data = stripes(8, seed=0)
    three = run(data, NOISY, num_eval=3).accs
    assert len(set(three)) == 3
    assert run(data, NOISY, num_eval=2).accs == three[:2]


def test_the_same_seed_gives_the_same_result_whatever_the_global_generator():
    data = stripes(8, seed=0)
    once = run(data, NOISY, num_eval=2)
    torch.rand(3)
    assert run(data, NOISY, num_eval=2) == once
    assert run(data, NOISY, num_eval=2, seed=1) != once


def test_a_separable_problem_is_learned():
    data, test = stripes(8, seed=0), stripes(100, seed=1)
    untrained = run(data, test, epochs=0)
    assert untrained.mean < 0.9
    assert run(data, test, epochs=30, num_eval=2, dsa_groups=None).accs == (1.0, 1.0)


def test_mean_and_population_deviation():
    result = Accuracies((0.2, 0.4, 0.9))
    assert result.mean == pytest.approx(0.5)
    assert result.std == pytest.approx(((0.3**2 + 0.1**2 + 0.4**2) / 3) ** 0.5)
    assert str(result) == "50.00% ± 29.44% (n=3)"
    assert Accuracies((0.7,)).std == 0
