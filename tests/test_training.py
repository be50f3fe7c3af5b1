"""Training and evaluation against loops written by hand, and the protocol they follow."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils import augment, evaluation
from utils.augment import DSA_STRATEGY, parse_strategy
from utils.data import Split
from utils.evaluation import Accuracies, Protocol, evaluate
from utils.rng import derive_seed, stream
from utils.training import accuracy, random_batches, scale_learning_rate, train_epoch

DSA = parse_strategy(DSA_STRATEGY)


def stripes(count: int, seed: int, noise: float = 0.3) -> Split:
    """Images 8x8 of two classes, horizontal and vertical stripes, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    horizontal = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(8, 8)
    clean = torch.stack([horizontal, horizontal.T])[labels][:, None]
    return Split(clean + noise * torch.randn(clean.shape, generator=generator), labels)


def test_random_batches_are_a_permutation_with_a_short_last_chunk():
    batches = list(random_batches(10, 4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    order = torch.cat(batches).tolist()
    assert sorted(order) == list(range(10)) != order
    again = torch.cat(list(random_batches(10, 4, torch.Generator().manual_seed(1)))).tolist()
    assert again != order


def test_an_epoch_is_the_loop_written_by_hand():
    data = stripes(10, seed=0)
    network, by_hand = (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for _ in range(2))
    by_hand.load_state_dict(network.state_dict())
    network.eval()
    loss, acc = train_epoch(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        data.images,
        data.labels,
        batch_size=4,
        dsa_groups=None,
        generator=torch.Generator().manual_seed(5),
    )

    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    losses, hits = [], 0
    for batch in (order[:4], order[4:8], order[8:]):
        logits = by_hand(data.images[batch])
        each = F.cross_entropy(logits, data.labels[batch], reduction="none")
        losses += each.tolist()
        hits += int((logits.argmax(1) == data.labels[batch]).sum())
        gradients = torch.autograd.grad(each.mean(), list(by_hand.parameters()))
        with torch.no_grad():
            for param, gradient in zip(by_hand.parameters(), gradients, strict=True):
                param -= 0.1 * gradient
    for a, b in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert loss.item() == pytest.approx(sum(losses) / 10)
    assert acc.item() == pytest.approx(hits / 10)
    assert network.training


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


def test_the_learning_rate_is_scaled_in_every_group():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 4.0}])
    scale_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0]


def run(
    data: Split,
    test: Split,
    *,
    num_eval: int = 1,
    epochs: int = 4,
    seed: int = 0,
    lr: float = 0.05,
    dsa_groups: tuple[str, ...] | None = DSA,
) -> Accuracies:
    return evaluate(
        data.images,
        data.labels,
        test,
        num_classes=2,
        model="ConvNetW32",
        lr=lr,
        protocol=Protocol(num_eval, epochs, batch_size=4, dsa_groups=dsa_groups),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("epochs", "lrs"), [(4, [0.05, 0.05, 0.005, 0.005]), (3, [0.05, 5e-3, 5e-3])]
)
def test_evaluation_follows_the_protocol_of_the_field(monkeypatch, epochs, lrs):
    data, test = stripes(6, seed=0), stripes(4, seed=1)
    measured = []

    def spy(network, images, labels):
        measured.append((network, images, labels))
        return 0.0

    monkeypatch.setattr(evaluation, "accuracy", spy)
    run(data, test, num_eval=2, epochs=epochs, seed=9)

    for k, (network, images, labels) in enumerate(measured):
        assert images is test.images and labels is test.labels
        by_hand = build_network(
            "ConvNetW32", channels=1, num_classes=2, image_size=8, seed=derive_seed(9, "init", k)
        )
        momenta = [torch.zeros_like(param) for param in by_hand.parameters()]
        rng = stream(9, "minibatch", k)
        for lr in lrs:
            for batch in random_batches(6, 4, rng):
                x = augment.apply(data.images[batch], augment.draw(DSA, len(batch), rng))
                loss = F.cross_entropy(by_hand(x), data.labels[batch])
                gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
                with torch.no_grad():
                    for p, v, g in zip(by_hand.parameters(), momenta, gradients, strict=True):
                        v.mul_(0.9).add_(g + 5e-4 * p)
                        p -= lr * v
        for a, b in zip(network.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


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
    assert augmented == [4, 2] * 2


def test_a_network_does_not_depend_on_how_many_there_are():
    data, test = stripes(8, seed=0), stripes(100, seed=1, noise=3.0)
    three = run(data, test, num_eval=3).accs
    assert len(set(three)) == 3
    assert run(data, test, num_eval=2).accs == three[:2]


def test_the_same_seed_gives_the_same_result_whatever_the_global_generator():
    data, test = stripes(8, seed=0), stripes(100, seed=1, noise=3.0)
    once = run(data, test, num_eval=2)
    torch.rand(3)
    assert run(data, test, num_eval=2) == once
    assert run(data, test, num_eval=2, seed=1) != once


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
