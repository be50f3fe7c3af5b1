"""The scoreboard: its scores by their definitions, its three files, sets that it leaves out."""

import json
import math
import shutil

import pandas as pd
import pytest

from scripts.scoreboard import __main__ as scoreboard
from scripts.scoreboard.rows import COLUMNS, scores_of
from scripts.scoreboard.scores import augmentation_robust_score, label_robust_score
from utils.data.distilled import SyntheticSet
from utils.measure.sets import real_images_in_bytes

QUICK = ["--num_eval", "2", "--epoch_eval_train", "2"]


@pytest.mark.parametrize(
    ("ior", "hlr", "expected"),
    [(1, -1, 1), (-1, 1, 0), (0, 0, (1 - math.exp(-1)) / (math.e - math.exp(-1)))],
)
def test_label_robust_score_is_within_0_and_1(ior, hlr, expected):
    assert label_robust_score(ior=ior, hlr=hlr) == pytest.approx(expected, abs=1e-12)


def test_scores_follow_from_accuracies_as_fractions():
    lines = {"distilled raw": (60, 50), "random real": (40, 35), "full": (80, math.nan)}
    rows = [
        ("a.pt", line, "ConvNetD3", augmented, accuracy, 0, 5, 10, "", None)
        for line, both in lines.items()
        for augmented, accuracy in zip((True, False), both, strict=True)
        if not math.isnan(accuracy)
    ]
    (found,) = scores_of(pd.DataFrame(rows, columns=COLUMNS)).itertuples()
    assert (pytest.approx(20), pytest.approx(20)) == (found.HLR, found.IOR)
    assert pytest.approx(100 * label_robust_score(ior=0.2, hlr=0.2)) == found.LRS
    expected = augmentation_robust_score(ior=0.2, ior_unaugmented=0.15)
    assert pytest.approx(100 * expected) == found.ARS


def test_a_score_without_a_part_is_missing():
    row = ("a.pt", "distilled raw", "ConvNetD3", True, 60.0, 0, 5, 10, "", None)
    (found,) = scores_of(pd.DataFrame([row], columns=COLUMNS)).itertuples()
    assert all(math.isnan(each) for each in (found.HLR, found.IOR, found.LRS, found.ARS))


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    """The scoreboard of a set, and of one that is damaged."""
    folder = tmp_path_factory.mktemp("scoreboard")
    run = shutil.copytree(finished, folder / "run")
    (folder / "damaged.pt").write_bytes(b"nothing")
    sets = [str(run / "distilled_best.pt"), str(folder / "damaged.pt")]
    argv = [*sets, "--out", str(folder / "out"), "--", *QUICK]
    return scoreboard.main(argv), folder, argv


def test_a_set_that_cannot_be_evaluated_is_named_and_the_rest_goes_on(written):
    status, folder, _ = written
    assert status == 1
    for name in ("scoreboard.md", "scoreboard.html"):
        assert "damaged.pt" in (folder / "out" / name).read_text()
    rows = pd.read_csv(folder / "out" / "scoreboard.csv")
    assert [*rows.columns] == COLUMNS
    lines = ["distilled raw", "random real", "random real, equal bytes", "full"]
    assert [*rows[rows["augmented"]]["line"]] == lines
    assert [*rows[~rows["augmented"]]["line"]] == ["distilled raw", "random real"]
    assert {*rows[rows["line"] == "distilled raw"]["chosen_by"]} == {"test"}
    assert rows["seconds"].notna().all()


def test_as_many_real_images_as_fit_into_the_bytes(written):
    """Ten float32 images of 8x8 take the bytes of forty: four of each class."""
    _, folder, _ = written
    entries = json.loads((folder / "run" / "eval.json").read_text())
    (entry,) = [each for each in entries if each["trained_on"].endswith("equal bytes")]
    assert entry["epochs"] == 2
    assert real_images_in_bytes(SyntheticSet.load(folder / "run" / "distilled_best.pt")) == 4


def test_the_same_call_measures_nothing_again(written, capsys):
    _, folder, argv = written
    before = (folder / "run" / "eval.json").read_text()
    assert scoreboard.main(argv) == 1
    assert (folder / "run" / "eval.json").read_text() == before
    assert "(recorded before)" in capsys.readouterr().out


def test_where_no_set_can_be_evaluated_nothing_is_written(tmp_path):
    with pytest.raises(scoreboard.UserError, match=r"no set can be evaluated: .*absent"):
        scoreboard.main([str(tmp_path / "absent.pt"), "--out", str(tmp_path / "out")])
    assert not [*(tmp_path / "out").iterdir()]
