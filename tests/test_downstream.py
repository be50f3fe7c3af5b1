"""What a set is good for: classes that come in steps, ranks of networks, who was in the data."""

import pandas as pd
import pytest
import torch

from scripts.downstream import __main__ as downstream
from scripts.downstream.continual import class_steps
from scripts.downstream.lines import Line
from scripts.downstream.privacy import attack
from scripts.downstream.search import correlations
from utils.core.errors import UserError
from utils.measure.sets import TrainingSet

QUICK = ["--", "--num_eval", "1", "--epoch_eval_train", "2"]


def test_classes_come_in_equal_steps():
    assert class_steps(10, 5) == [range(2), range(4), range(6), range(8), range(10)]
    with pytest.raises(UserError, match=r"--steps 3 does not divide 10 classes: .*\[1, 2, 5, 10\]"):
        class_steps(10, 3)


@pytest.mark.parametrize("several", [False, True])
def test_a_part_of_a_line_keeps_images_and_labels_together(several):
    images, classes = torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    soft = torch.arange(18.0).view(6, 3)
    shown = [images, images + 10] if several else images
    whole = Line(TrainingSet("x", shown, soft, 0.1, 1, label_form="logits"), classes)
    part = whole.only(torch.tensor([0, 2]))
    kept = torch.tensor([0, 1, 4, 5])
    ours = part.training_set.images
    assert torch.equal(ours[1] - 10 if several else ours, images[kept])
    assert torch.equal(part.training_set.labels, soft[kept])
    assert torch.equal(part.classes, classes[kept])


def test_an_attack_counts_pairs_of_losses():
    members, others = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.2, 0.6, 0.7, 0.05])
    pairs = [float(a < b) + 0.5 * float(a == b) for a in members for b in others]
    found = attack(members, others)
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    assert found.advantage == pytest.approx(3 / 3 - 2 / 4)
    assert attack(members, members).auc == 0.5 and attack(members, members).advantage == 0
    assert attack(members, members + 1).auc == 1 and attack(members, members + 1).advantage == 1


def test_correlations_are_of_ranks():
    ours = {"a": 0.1, "b": 0.2, "c": 0.9}
    assert correlations(ours, {"a": 1, "b": 2, "c": 3}) == (1, 1)
    assert correlations(ours, {"a": 3, "b": 2, "c": 1}) == (-1, -1)


def run(what, finished, tmp_path, *flags):
    out = tmp_path / f"{what}.csv"
    argv = [what, str(finished / "distilled_last.pt"), "--out", str(out), *flags, *QUICK]
    assert downstream.main(argv) == 0
    return pd.read_csv(out)


def test_continual_has_a_column_for_each_step(finished, tmp_path):
    found = run("continual", finished, tmp_path, "--steps", "2")
    assert [*found.columns] == ["line", "5 classes", "10 classes"]
    assert [*found["line"]] == ["distilled raw", "random real"]


def test_search_ranks_the_networks(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downstream, "GRID", ["ConvNetD1", "ConvNetW32", "ConvNetD4"])
    found = run("search", finished, tmp_path)
    assert [*found["line"]] == ["distilled raw", "random real", "full"]
    assert found[found["line"] == "full"]["spearman"].item() == pytest.approx(1)
    assert "left out: ConvNetD4" in capsys.readouterr().out


def test_privacy_attacks_members_of_both_kinds(finished, tmp_path):
    found = run("privacy", finished, tmp_path)
    members = {line: [*rows["members"]] for line, rows in found.groupby("line", sort=False)}
    assert members == {
        "distilled raw": ["training images"],
        "random real": ["training images", "the images that networks saw"],
        "full": ["training images"],
    }
    assert found["auc"].between(0, 1).all()
