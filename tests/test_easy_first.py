"""Experts trained easy-first, and PAD on them."""

import json
from types import SimpleNamespace

import pytest
import torch
from short_runs import (
    SHORT,
    records,
    run,
    snapshots,
    train_experts,
)
from test_continuing import assert_same_experts, cut_off_training
from test_training import CPU, DATA, make_cohort, make_recipe, state_of

import buffer
import distill_att
from scripts.plan.cells import Row, row_options
from utils.compute.cohort import Cohort
from utils.compute.execution import Execution
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.experts.easy_first import EasyFirst, Judges, el2n, images_by_epoch
from utils.experts.files import begin, keep_expert
from utils.methods.registry import title
from utils.options import BufferOptions

EASY = "--easy_first --el2n_experts 2".split()
FOLDER = "digits_EASY_FIRST/ConvNetD1"
PAD = EasyFirst(share=0.75, all_from=20, drops=((40, 0.1), (60, 0.2)))


def test_el2n_is_the_length_of_softmax_less_the_label():
    """Logits (log 1, log 3) say 1/4 and 3/4."""
    logits = torch.tensor([[0.0, 3.0], [1.0, 1.0], [-60.0, 60.0]]).double()
    logits[0, 1] = torch.tensor(3.0).log()
    found = el2n(logits, torch.tensor([0, 1, 0]))
    expected = torch.tensor([0.75 * 2**0.5, 0.5 * 2**0.5, 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert el2n(logits, torch.tensor([1, 1, 1])).tolist()[2] < 1e-30


class Said:
    """Experts whose logits after an epoch are `of[epoch]` (experts, N, C)."""

    def __init__(self, of):
        self.of, self.experts = of, range(len(of[1]))

    def logits(self, expert, images, *, epoch):
        return self.of[epoch][expert]


def test_difficulty_is_the_mean_over_experts_and_kept_for_later_calls(tmp_path):
    logits = {epoch: torch.randn(3, 5, 4, dtype=torch.float64) for epoch in (1, 2)}
    labels = torch.tensor([0, 3, 1, 1, 2])
    images = SimpleNamespace(parts={"train": SimpleNamespace(digest="these")})
    split = Split(torch.zeros(5, 1, 1, 1), labels)
    for epoch in (2, 1):  # of another epoch, computed anew
        found = Judges(Said(logits), epoch, images).difficulty(split, tmp_path)
        by_hand = [
            sum(
                sum((p - int(c == label)) ** 2 for c, p in enumerate(row.softmax(0))) ** 0.5
                for row in logits[epoch][:, n]
            )
            / 3
            for n, label in enumerate(labels)
        ]
        torch.testing.assert_close(found, torch.stack(by_hand))
    other = Judges(Said({1: torch.zeros(3, 5, 4)}), 1, images).difficulty(split, tmp_path)
    assert torch.equal(other, found)


@pytest.mark.parametrize(
    ("epoch", "seen"),
    [
        (0, range(0, 3750)),
        (1, range(0, 3812)),  # 0.7625 of 5,000 is 3812.5
        (10, range(0, 4375)),
        (19, range(0, 4937)),
        (20, range(0, 5000)),
        (40, range(0, 5000)),
        (41, range(500, 5000)),
        (60, range(500, 5000)),
        (61, range(1000, 5000)),
        (99, range(1000, 5000)),
    ],
)
def test_epochs_see_what_pads_code_shows_them(epoch, seen):
    """CIFAR-10's 5,000 images of a class, by its command."""
    assert PAD.seen(epoch, 5000) == seen


def test_parts_are_rounded_down_and_no_class_is_left_out():
    assert EasyFirst(0.29, 2, ()).seen(0, 100) == range(29)  # 0.29 * 100 < 29 in floats
    assert EasyFirst(0.1, 2, ()).seen(0, 5) == range(1)
    assert EasyFirst(1.0, 0, ((0, 0.99),)).seen(1, 1) == range(0, 1)
    assert EasyFirst(1.0, 0, ((0, 0.99),)).seen(1, 2) == range(1, 2)
    assert PAD.counts(42, [10, 1])[::41] == [7 + 1, 9 + 1]


def test_each_class_is_ranked_by_itself():
    plan = EasyFirst(0.5, 1, ((1, 0.5),))
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 1])
    difficulty = torch.tensor([0.9, 0.1, 0.4, 0.2, 0.3, 0.3, 0.5])
    images = images_by_epoch(plan, difficulty, labels)
    # class 0 from easy to hard: 1, 4, 5 (a tie stays in order), 2; class 1: 3, 6, 0
    assert images(0).tolist() == [1, 3, 4]
    assert images(1).tolist() == list(range(7))
    assert images(2).tolist() == [0, 2, 5, 6]


def plan_of(*flags):
    resolved = buffer.parse(["--easy_first", *flags])
    buffer.check_flags(resolved)
    return resolved.options


def test_settings_are_those_of_pad_scaled_to_the_epochs():
    assert plan_of().by_difficulty == PAD
    assert plan_of().train_epochs == 100
    assert (plan_of().all_from, plan_of().drop_after) == (20, [40, 60])
    assert plan_of("--dataset", "CIFAR100").all_from == 40
    assert plan_of("--dataset", "Tiny").all_from == 40
    few = plan_of("--train_epochs", "10", "--easy_share", "0.5")
    assert few.by_difficulty == EasyFirst(0.5, 2, ((4, 0.1), (6, 0.2)))
    assert plan_of("--train_epochs", "1").by_difficulty.all_from == 0
    given = plan_of(*"--all_from 3 --drop_after 5 --drop_easiest 0.3".split())
    assert given.by_difficulty == EasyFirst(0.75, 3, ((5, 0.3),))
    assert BufferOptions().by_difficulty is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--drop_after 3", r"1 epochs \(3\) do not go with 2 shares \(0.1 0.2\)"),
        ("--drop_after 50 30", "--drop_after 50 30: give the epochs in their order"),
        ("--all_from 41", "--drop_after 40 is before --all_from 41"),
        ("--no_easy_first --all_from 3", "--all_from is for --easy_first: add that, or leave"),
        ("--el2n_experts 1", "--el2n_experts must be at least 2, not 1"),
        ("--easy_share 0", "--easy_share must be above 0"),
        ("--drop_easiest 1 1", "--drop_easiest must be at most 0.99, not 1"),
    ],
)
def test_contradictions_are_refused(flags, problem):
    with pytest.raises(UserError, match=problem):
        plan_of(*flags.split())


@pytest.mark.parametrize("execution", [Execution(), Execution(vectorised=True)])
def test_training_on_some_images_is_training_on_those_alone(execution):
    """Two networks together; with images of their own, each sees the same numbers of its own."""
    seen = torch.tensor([0, 3, 4, 6, 8, 9])

    def train(images, labels, seen=None):
        cohort = make_cohort(make_recipe(execution=execution), [3, 4])
        progress = cohort.train(
            images,
            labels,
            epochs=2,
            lr=0.05,
            batch_size=4,
            dsa_groups=None,
            generators=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
            seen=seen,
        )
        return progress, [value for net in cohort.networks for value in state_of(net)]

    own = torch.stack([DATA.images, 2 * DATA.images])
    for all_images, part in ((DATA.images, DATA.images[seen]), (own, own[:, seen])):
        progress, found = train(all_images, DATA.labels, seen)
        expected_progress, expected = train(part, DATA.labels[seen])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(progress.losses, expected_progress.losses)
        assert torch.equal(progress.accuracies, expected_progress.accuracies)
    numbers = torch.arange(len(DATA.labels))
    every, chosen = train(DATA.images, DATA.labels)[1], train(DATA.images, DATA.labels, numbers)[1]
    assert all(map(torch.equal, every, chosen))


def test_sizes_that_hardly_come_again_are_not_compiled(monkeypatch):
    """10 images in batches of 4 have batches of 4 and 2; 7 of them have one of 3."""
    sizes = {"usual": set(), "rare": set()}
    cohort = make_cohort(make_recipe(execution=Execution(vectorised=True)), [3])
    usual, rare = cohort._steps, cohort._plain_steps
    assert rare is not usual

    def noting(name, steps):
        return lambda *inputs: sizes[name].add(inputs[-1].shape[1]) or steps(*inputs)

    cohort._steps = noting("usual", usual)
    monkeypatch.setattr(Cohort, "_plain_steps", property(lambda self: noting("rare", rare)))
    for seen in (None, torch.arange(7), torch.arange(6)):
        cohort.train(
            DATA.images,
            DATA.labels,
            epochs=1,
            lr=0.05,
            batch_size=4,
            dsa_groups=None,
            generators=[torch.Generator().manual_seed(3)],
            seen=seen,
        )
    assert sizes == {"usual": {4, 2}, "rare": {3}}
    assert cohort._device == CPU


@pytest.fixture(scope="module")
def easy_experts(experts, tmp_path_factory):
    """A folder with the ordinary experts and two that were trained easy-first."""
    path = tmp_path_factory.mktemp("easy")
    (path / "digits").symlink_to(experts / "digits")
    return train_experts(path, 2, *EASY, "--train_epochs", "5")


def test_experts_trained_easy_first_are_others_in_a_folder_of_their_own(easy_experts):
    folder = easy_experts / FOLDER
    settings = json.loads((folder / "experts.json").read_text())
    assert (settings["easy_first"], settings["easy_share"]) == (True, 0.75)
    assert (settings["all_from"], settings["drop_after"]) == (1, [2, 3])
    assert (folder / "difficulty.pt").exists()
    ordinary = json.loads((easy_experts / "digits/ConvNetD1/experts.json").read_text())
    assert not {"easy_first", "all_from", "el2n_experts"} & set(ordinary)  # as before they were


def test_every_epoch_sees_its_images_in_the_order_of_the_folder(easy_experts, monkeypatch):
    seen = []
    train = Cohort.train
    monkeypatch.setattr(
        Cohort, "train", lambda *a, **kw: seen.append((a[2], kw["seen"])) or train(*a, **kw)
    )
    train_experts(easy_experts, 3, *EASY, "--train_epochs", "5")  # one more
    (labels, _), *_ = seen
    difficulty = cached(easy_experts / FOLDER / "difficulty.pt", key_of(easy_experts), dict)["el2n"]
    plan = EasyFirst(0.75, 1, ((2, 0.1), (3, 0.2)))
    for epoch, (_, numbers) in enumerate(seen):
        for label in range(10):
            own = (labels == label).nonzero().flatten()
            order = sorted(own.tolist(), key=lambda n: difficulty[n].item())
            part = plan.seen(epoch, len(order))
            expected = sorted(order[part.start : part.stop])
            assert numbers[labels[numbers] == label].tolist() == expected
    assert [len(numbers) for _, numbers in seen][1] == len(labels) == 1437


def key_of(path):
    return torch.load(path / FOLDER / "difficulty.pt", weights_only=True)["key"]


@pytest.mark.parametrize("flags", [[], ["--experts_at_once", "2"]])
def test_they_go_on_alike(experts, tmp_path, monkeypatch, flags):
    few = [*EASY, "--train_epochs", "4", *flags]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits").symlink_to(experts / "digits")
    train_experts(tmp_path / "whole", 2, *few)
    cut_off_training(tmp_path / "cut", monkeypatch, 3, 2, *few)
    train_experts(tmp_path / "cut", 2, *few)
    assert_same_experts(tmp_path / "cut" / FOLDER, tmp_path / "whole" / FOLDER)
    assert len(snapshots(tmp_path / "cut" / FOLDER)) == 10


def test_too_few_ordinary_experts_are_one_line_with_the_command(experts, tmp_path):
    def refused(path, *flags):
        argv = ["--dataset", "digits", "--model", "ConvNetD1", "--easy_first"]
        done = run("buffer.py", *argv, "--buffer_path", path, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    line = refused(tmp_path / "none")
    assert "ranks images by 10 ordinary experts (--el2n_experts): no expert buffers in" in line
    command = f"python buffer.py --dataset digits --model ConvNetD1 --buffer_path {tmp_path}/none"
    assert line.endswith(f"{command} --data_path data --num_experts 10")
    assert not (tmp_path / "none").exists()
    line = refused(experts, "--el2n_experts", "3")
    assert "ConvNetD1 has 2; make the others with" in line
    assert line.endswith("--train_epochs 2 --num_experts 3")  # as long as those
    assert not (experts / FOLDER).exists()


def test_settings_of_the_order_bind_what_was_begun(easy_experts):
    flags = "--dataset digits --model ConvNetD1 --num_experts 4 --train_epochs 5".split()
    with pytest.raises(UserError, match=r"was begun with easy_share=0.75, not 0.5: pass that"):
        buffer.main([*flags, *EASY, "--easy_share", "0.5", "--buffer_path", str(easy_experts)])


def test_an_unfinished_expert_of_before_goes_on(tmp_path):
    """What experts.json says of ordinary experts is what it said before this flag."""
    options = BufferOptions()
    before = {name for name in buffer.recorded_settings(options) if "easy" in name}
    assert before == set()
    begin(tmp_path, buffer.recorded_settings(options))
    keep_expert(tmp_path, 0, [[torch.zeros(1)], [torch.ones(1)]])
    begin(tmp_path, buffer.recorded_settings(options))


PAD_FLAGS = (
    "--method pad --no_flat --start_epochs 0 2 --current_max_start_epoch 1 --expansion_end_epoch 3"
).split()
AT = SHORT.index("--max_start_epoch")


def pad_flags(buffer_path, save_path, *flags):
    paths = ["--buffer_path", str(buffer_path), "--save_path", str(save_path)]
    return [*SHORT[:AT], *SHORT[AT + 2 :], *PAD_FLAGS, *paths, "--run_name", "run", *flags]


def distill_by_pad(buffer_path, save_path, *flags):
    assert distill_att.main(pad_flags(buffer_path, save_path, *flags)) == 0
    return save_path / "digits/ConvNetD1/ipc1/run"


def test_pad_end_to_end(easy_experts, tmp_path, capsys):
    run_dir = distill_by_pad(easy_experts, tmp_path)
    out = capsys.readouterr().out
    assert "easy_first         True                               --method pad" in out
    assert "2 experts of 5 epochs" in out or "3 experts of 5 epochs" in out
    config = torch.load(run_dir / "distilled_last.pt", weights_only=True)["config"]
    assert (config["easy_first"], config["depth_ratio"], config["soft_labels"]) == (
        True,
        0.25,
        True,
    )
    assert title(config) == "PAD"
    datm = distill_by_pad(easy_experts, tmp_path / "datm", "--no_easy_first", "--depth_ratio", "0")
    losses = [[step["loss"] for step in records(each, "step")] for each in (run_dir, datm)]
    assert len(losses[0]) == 4 and losses[0] != losses[1]


def test_pad_without_its_experts_names_their_command(experts, tmp_path):
    match = r"no expert buffers in .*digits_EASY_FIRST/ConvNetD1, but in .*digits/ConvNetD1, for "
    with pytest.raises(UserError, match=match + r"--no_easy_first; make .*--easy_first$"):
        distill_att.main(pad_flags(experts, tmp_path))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "PAD"),
        ({"depth_ratio": 0}, "PAD"),
        ({"easy_first": False}, "DATM + PAD's depth"),
        ({"easy_first": False, "depth_ratio": 0}, "DATM"),
        ({"soft_labels": False}, "DATM, hard labels + PAD's experts + PAD's depth"),
        ({"start_epochs": None, "soft_labels": False}, "FTD + PAD's experts + PAD's depth"),
    ],
)
def test_the_whole_is_called_pad_and_its_parts_by_name(changes, name):
    assert title(vars(row_options(Row("CIFAR10", None, 10, "pad"))) | changes) == name


def test_rows_are_those_of_the_notes():
    """The bound of start epochs grows by 1 every so many steps."""
    rows = [
        row_options(Row(d, None, k, "pad"))
        for d in ("CIFAR10", "CIFAR100", "Tiny")
        for k in (1, 10, 50)
    ]
    assert all(o.easy_first and o.flat and o.zca and o.soft_labels for o in rows)
    assert [o.depth_ratio for o in rows] == [0, 0.25, 0.25, 0, 0.25, 0.5, 0, 0.25, 0.5]
    assert [o.syn_steps for o in rows] == [80, 80, 80, 40, 80, 80, 60, 60, 80]
    assert [o.starts.end for o in rows] == [4, 20, 40, 20, 40, 80, 30, 40, 60]
    for options in rows[1:]:
        starts, every = (
            options.starts,
            400 if (options.dataset, options.ipc) == ("Tiny", 1) else 100,
        )
        assert [starts.bound(it) - starts.bound(0) for it in (every - 1, every)] == [0, 1]
    assert rows[0].starts.bound(0) == 4
