"""The figures: arrays from hand-made records with known answers, and that they can be drawn."""

from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
from made_runs import (
    att,
    curve,
    diverged,
    evaluation,
    fixed,
    steps,
    steps_without_lengths,
    write_run,
)

from scripts.figures import __main__ as figures
from scripts.figures import data, drawing
from scripts.results.runs import read_runs
from utils.core.errors import UserError
from utils.methods.registry import foreign_flags


def runs_in(path):
    runs, problems = read_runs([path], attrgetter("steps"), also=data.EVALUATION)
    assert problems == []
    return runs


def series(frame, *names):
    """The values of the other columns, by those of `names`."""
    return {key: same.drop(columns=list(names)) for key, same in frame.groupby(list(names))}


def test_mismatches_are_counted_by_interval(tmp_path):
    fixed(tmp_path / "a", [4, 2, 1, 4, 4, 3, 1], syn_steps=4)  # off by 0 2 3 | 0 0 1 | 3
    fixed(tmp_path / "b", [1, 1, 1, 4, 4, 4, 1], syn_steps=4, seed=1)  # 3 3 3 | 0 0 0 | 3
    fixed(tmp_path / "c", [6] * 7, syn_steps=9)
    att(tmp_path / "d", [3] * 7, syn_steps=4)
    found = series(data.mismatches(runs_in(tmp_path), gamma=2, interval=3), "policy", "syn_steps")
    assert list(found) == [("att", 4), ("fixed", 4), ("fixed", 9)]
    assert found["fixed", 4]["cases"].tolist() == [2, 0]  # the means of 1 and 3, of 0 and 0
    assert found["fixed", 4]["mean"].tolist() == pytest.approx([(5 / 3 + 3) / 2, (1 / 3 + 0) / 2])
    assert found["fixed", 9][["cases", "mean"]].to_numpy().tolist() == [[3, 3], [3, 3]]
    assert found["att", 4][["cases", "mean"]].to_numpy().tolist() == [[0, 0], [0, 0]]


def test_gamma_is_a_tolerance_that_is_itself_allowed(tmp_path):
    fixed(tmp_path / "a", [2, 1, 2, 1], syn_steps=4)
    count = {
        gamma: data.mismatches(runs_in(tmp_path), gamma=gamma, interval=2)["cases"].tolist()
        for gamma in (1, 2, 3)
    }
    assert count == {1: [2, 2], 2: [1, 1], 3: [0, 0]}


def test_several_trajectories_are_cases_of_their_own(tmp_path):
    records = steps([[4, 4], [4, 4]], [[1, 4], [2, 1]])
    write_run(tmp_path / "a", records, length="fixed", syn_steps=4, trajectories=2)
    found = data.mismatches(runs_in(tmp_path), gamma=2, interval=2)
    assert found[["cases", "mean"]].to_numpy().tolist() == [[2, 2]]


def test_a_run_that_diverged_counts_as_far_as_it_goes(tmp_path):
    fixed(tmp_path / "a", [2, 2, 2, 2], syn_steps=4)
    diverged(tmp_path / "b", after=3, Iteration=4, length="fixed", syn_steps=4, seed=1)
    found = data.mismatches(runs_in(tmp_path), gamma=1, interval=2)
    assert found[["cases", "mean"]].to_numpy().tolist() == [[2, 2], [2, 2]]


def test_curves_begin_at_one_and_match_the_loss(tmp_path):
    """theta_0 is 8 away: the losses are 4/8 where step 2 is matched, 6/8 where step 3 is."""
    records = steps([3, 3, 3], [2, 2, 2], losses=[6 / 8, 1.0, 3.0])
    records = [curve(0, [5, 4, 6], 3), records[0], records[1], curve(2, [2, 1, 3], 3), records[2]]
    write_run(tmp_path / "f", records, length="fixed", syn_steps=3)
    records = steps([2, 2, 2], [2, 2, 2], losses=[4 / 8, 1.0, 1.0])
    records = [curve(0, [5, 4, 6], 2), records[0], records[1], curve(2, [8, 4, 12], 2), records[2]]
    write_run(tmp_path / "a", records, length="att", syn_steps=3)
    write_run(tmp_path / "other_seed", records, length="att", syn_steps=3, seed=7)

    found = data.distance_curves(runs_in(tmp_path))
    places = [(0, "att"), (0, "fixed"), (2, "att"), (2, "fixed")]
    assert list(found[["iteration", "policy"]].itertuples(index=False, name=None)) == places
    assert found["n_opt"].tolist() == [2] * 4
    at_start, _, *at_end = found["distances"]
    assert at_start == pytest.approx([1, 5 / 8, 4 / 8, 6 / 8])
    assert found["distances"][1] == pytest.approx(at_start)  # the same images then
    assert all(curve == pytest.approx([1, 2, 1, 3]) for curve in at_end)


def test_curves_need_a_loss_that_is_a_distance(tmp_path):
    records = [curve(0, [1, 2], 1), *steps([1, 1], [1, 1])]
    write_run(tmp_path / "a", records, prune_threshold=1e-3)
    with pytest.raises(data.Missing, match="--log_distances"):
        data.distance_curves(runs_in(tmp_path))


def test_lengths_of_att_by_bound_and_seed(tmp_path):
    att(tmp_path / "a", [1, 2, 3], syn_steps=30)
    att(tmp_path / "b", [3, 2, 5], syn_steps=30, seed=1)
    att(tmp_path / "c", [9, 9, 9], syn_steps=50)
    fixed(tmp_path / "d", [1, 1, 1], syn_steps=70)
    found = data.chosen_lengths(runs_in(tmp_path))
    assert found.index.get_level_values("syn_steps").tolist() == [30, 30, 50]
    assert found.to_numpy().tolist() == [[1, 2, 3], [3, 2, 5], [9, 9, 9]]


def test_the_running_median_is_over_seeds_and_iterations():
    lengths = np.array([[1.0, 2, 9, 4], [1, 2, 3, np.nan]])
    assert drawing.running_median(lengths, 0).tolist() == [1, 2, 6, 4]
    assert drawing.running_median(lengths, 1).tolist() == [1.5, 2, 3, 4]


def repeats(path, *, policy, lr_img, lr_lr, failing):
    """Five repeats, of which so many diverge."""
    rates = {"length": policy, "syn_steps": 4, "lr_img": lr_img, "lr_lr": lr_lr}
    for seed in range(5):
        name = path / f"{policy}_{lr_img}_{lr_lr}_{seed}"
        if seed < failing:
            diverged(name, after=seed, seed=seed, **rates)
        else:
            write_run(name, steps([4] * 5, [2] * 5), seed=seed, **rates)


def test_successes_at_each_multiplier(tmp_path):
    for policy, by_img, by_lr in (("att", (0, 1), (2,)), ("fixed", (3, 5), (4,))):
        repeats(tmp_path, policy=policy, lr_img=3.0, lr_lr=1e-7, failing=0)
        for lr_img, failing in zip((30.0, 300.0), by_img, strict=True):
            repeats(tmp_path, policy=policy, lr_img=lr_img, lr_lr=1e-7, failing=failing)
        repeats(tmp_path, policy=policy, lr_img=3.0, lr_lr=4e-7, failing=by_lr[0])
    found = series(data.successes(runs_in(tmp_path)), "rate", "policy")
    assert {
        key: [same["multiplier"].round(6).tolist(), same["successes"].tolist()]
        for key, same in found.items()
    } == {
        ("lr_img", "att"): [[1, 10, 100], [5, 5, 4]],
        ("lr_img", "fixed"): [[1, 10, 100], [5, 2, 0]],
        ("lr_lr", "att"): [[1, 4], [5, 3]],
        ("lr_lr", "fixed"): [[1, 4], [5, 1]],
    }
    assert all(set(same["repeats"]) == {5} for same in found.values())


def test_an_unfinished_repeat_is_named_and_does_not_count(tmp_path):
    repeats(tmp_path, policy="att", lr_img=3.0, lr_lr=1e-7, failing=1)
    repeats(tmp_path, policy="att", lr_img=6.0, lr_lr=1e-7, failing=1)
    cut = tmp_path / "att_6.0_1e-07_3/metrics.jsonl"
    cut.write_text("\n".join(cut.read_text().splitlines()[:3]))
    runs, problems = read_runs([tmp_path], attrgetter("steps"))
    assert problems == [f"{cut.parent}: is unfinished, 3 of 5 steps"]
    found = data.successes(runs)
    assert found[["successes", "repeats"]].to_numpy().tolist() == [[4, 5], [3, 4]]


def base_of(settings):
    return data.base_rates(pd.DataFrame(settings, columns=data.RATES))


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ([(3, 1), (6, 1), (3, 2), (3, 4)], (3, 1)),
        ([(3, 1), (1, 1), (9, 1), (3, 2), (3, 0)], (3, 1)),  # not the smallest
        ([(3, 1), (6, 1), (9, 1)], (3, 1)),
        ([(3, 1), (3, 5)], (3, 1)),
    ],
)
def test_the_base_is_what_all_settings_share(settings, base):
    assert tuple(base_of(settings).values()) == base


def test_rates_that_are_varied_together_have_no_base():
    with pytest.raises(data.Missing, match="one at a time"):
        base_of([(1, 1), (2, 2), (3, 3)])


def test_a_rate_that_no_policy_varies_is_missing(tmp_path):
    att(tmp_path / "a", [1], syn_steps=4, lr_img=6.0)
    fixed(tmp_path / "b", [1], syn_steps=4)
    with pytest.raises(data.Missing, match="one at a time"):
        data.successes(runs_in(tmp_path))


def test_accuracies_over_seeds_and_time(tmp_path):
    for seed, last in ((0, 0.8), (1, 0.6)):
        records = [
            evaluation(0, 0.25),
            evaluation(0, 0.99, model="AlexNet"),
            evaluation(0, 0.5, set="ema"),
            *steps([2] * 4, [2] * 4, seconds=1.0 + seed),
            evaluation(4, last),
            evaluation(4, 0.5, set="ema"),
        ]
        write_run(tmp_path / f"{seed}", records, seed=seed)
    write_run(tmp_path / "not_evaluated", steps([2] * 4, [2] * 4), seed=2)
    other = [evaluation(0, 0.1), *steps([2] * 4, [2] * 4), evaluation(4, 0.1)]
    write_run(tmp_path / "in_another_way", other, seed=3, epoch_eval_train=7)
    found = data.accuracies(runs_in(tmp_path))
    assert set(found["seeds"]) == {2}
    raw, ema = (same for _, same in found.groupby("set", sort=False))
    assert raw["iteration"].tolist() == [0, 4]
    assert raw["seconds"].tolist() == [0, 6]  # 4 s and 8 s
    assert raw["mean"].tolist() == pytest.approx([25, 70])
    assert raw["std"].tolist() == pytest.approx([0, 10])
    assert ema["mean"].tolist() == pytest.approx([50, 50])


def test_a_method_without_lengths_has_accuracies_under_its_own_name(tmp_path):
    records = [evaluation(0, 0.25), *steps_without_lengths(4), evaluation(4, 0.75)]
    write_run(tmp_path / "a", records, experts=None, method="dm", drop=foreign_flags("dm"))
    found = data.accuracies(runs_in(tmp_path))
    assert set(found["policy"]) == {"DM"}
    assert found["mean"].tolist() == pytest.approx([25, 75])
    assert drawing.draw_accuracies(found).legends
    for collect in (data.chosen_lengths, data.distance_curves):
        with pytest.raises(data.Missing):
            collect(runs_in(tmp_path))
    with pytest.raises(data.Missing):
        data.mismatches(runs_in(tmp_path), gamma=1, interval=1)


def test_runs_that_differ_in_more_are_not_compared(tmp_path):
    att(tmp_path / "a", [1, 2], syn_steps=30)
    att(tmp_path / "b", [1, 2], syn_steps=50)
    att(tmp_path / "c", [1, 2], syn_steps=70, lr_img=9.0)
    att(tmp_path / "d", [1, 2, 3], syn_steps=90)
    att(tmp_path / "e", [1, 2], syn_steps=80, experts={"number": 3, "epochs": 4})
    found = data.chosen_lengths(runs_in(tmp_path))
    assert found.index.get_level_values("syn_steps").tolist() == [30, 50]


def test_a_figure_whose_runs_are_not_there_is_skipped(tmp_path, capsys):
    att(tmp_path / "r", [1, 2, 3], syn_steps=30, dataset="CIFAR10")
    out = tmp_path / "figures"
    assert figures.main([str(tmp_path), "--out", str(out), "--interval", "3"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "fig4_left_CIFAR10.png",
        "fig4_left_CIFAR10.pdf",
    }
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 5
    assert "fig2_CIFAR10 skipped: it needs runs with --length fixed of 3 steps or more" in skipped


def test_series_differ_by_more_than_colour():
    parts = [[look[name] for look in drawing.LOOKS] for name in ("linestyle", "marker")]
    for part in [*parts, drawing.HATCHES]:
        assert len(set(part)) == len(drawing.LOOKS)


def test_the_same_figure_gives_the_same_files(tmp_path):
    att(tmp_path / "a", [1, 2], syn_steps=4)
    contents = []
    for name in ("a", "b"):
        figure = drawing.draw_lengths(data.chosen_lengths(runs_in(tmp_path)))
        contents.append([path.read_bytes() for path in drawing.save(figure, tmp_path / name / "f")])
    assert contents[0] == contents[1]


def test_nothing_to_draw_is_bad_input(tmp_path):
    with pytest.raises(UserError, match=f"no finished run in {tmp_path}"):
        figures.main([str(tmp_path)])
    write_run(tmp_path / "empty", [], Iteration=0)
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
