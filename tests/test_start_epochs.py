from collections import Counter

import pytest

from utils.core.rng import stream
from utils.methods.trajectory.starts import StartEpochs
from utils.options import DistillOptions


def draws(starts, iteration, count=300):
    generator = stream(0, "test")
    return Counter(starts.draw(iteration, generator) for _ in range(count))


def test_they_are_uniform_on_their_range():
    counts = draws(StartEpochs(5, first=2), iteration=7)
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 60


def test_the_bound_grows_linearly_as_in_datm():
    """min(now + int((end - now) * iteration / grown_at), end), its published schedule."""
    starts = StartEpochs(50, first=5, first_end=20, grown_at=700)
    expected = [min(20 + int((50 - 20) * it / 700), 50) for it in range(0, 1500, 13)]
    assert [starts.bound(it) for it in range(0, 1500, 13)] == expected
    assert max(draws(starts, 0)) < 20 <= max(draws(starts, 700))


@pytest.mark.parametrize("first, first_end", [(3, None), (-1, None), (1, 1), (0, 4)])
def test_an_empty_range_is_refused(first, first_end):
    with pytest.raises(ValueError, match="no start epochs"):
        StartEpochs(3, first, first_end, grown_at=9)


def test_flags_give_them():
    assert DistillOptions(max_start_epoch=7).starts == StartEpochs(7)
    asked = DistillOptions(
        start_epochs=[2, 9], current_max_start_epoch=4, expansion_end_epoch=100
    ).starts
    assert asked == StartEpochs(9, 2, 4, 100)
