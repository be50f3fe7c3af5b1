"""What is made from images knows them again, and others are refused before any work."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made_runs import entry, write_run
from short_runs import SHORT

import buffer
import distill_att
import eval as evaluation
from scripts.results.evaluations import measured
from scripts.results.runs import read_run
from utils.core import ranks
from utils.core.errors import UserError
from utils.data.dataset import find_dataset
from utils.data.identity import DataIdentity, identity_of
from utils.experts.files import begin, holds_experts, unfinished_file

MINE = "--dataset folder --res 8 --model ConvNetD1".split()
# What a mismatch of all images is called.
OTHERS = r"made from the images of \S*/a/data \(digest [0-9a-f]{8}\), not from the images of "
OTHERS += r"\S*/b/data \(digest [0-9a-f]{8}\): "


def pictures(root: Path, *classes: str, seed: int = 0) -> Path:
    """Three training and two test images of 8x8 pixels a class, the same bytes for a seed."""
    rng = np.random.default_rng(seed)
    for label in classes:
        for split, count in (("train", 3), ("test", 2)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=8 * 8, dtype=np.uint8).tobytes()
                (root / split / label / f"{number}.pgm").write_bytes(b"P5 8 8 255\n" + pixels)
    return root


def identity(path: Path, **how) -> DataIdentity:
    return identity_of(find_dataset("folder", data_path=path, **how), str(path))


def check(now: DataIdentity, before: DataIdentity, splits=("train", "test")) -> None:
    now.check_same_as(before.to_dict(), splits, what="run x", advice="give another --run_name")


def change(path: Path, content: bytes = b"P5 8 8 255\n" + bytes(64)) -> None:
    """Other bytes, as many, with the times of before."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(one: Path, other: Path) -> None:
    one_content, other_content = one.read_bytes(), other.read_bytes()
    change(one, other_content)
    change(other, one_content)


CHANGES = {
    "a class more": (
        lambda root: [shutil.copytree(root / each / "cat", root / each / "eel") for each in PARTS],
        "3 classes instead of 2",
    ),
    "a class renamed": (
        lambda root: [(root / each / "dog").rename(root / each / "eel") for each in PARTS],
        "class eel instead of dog",
    ),
    "an image more": (
        lambda root: shutil.copy(root / "train/cat/0.pgm", root / "train/cat/3.pgm"),
        "7 train images instead of 6",
    ),
    "a test image less": (
        lambda root: (root / "test/cat/0.pgm").unlink(),
        "3 test images instead of 4",
    ),
    "an image of the same size and time": (
        lambda root: change(root / "train/cat/0.pgm"),
        "as many train images, of other content, labels or order",
    ),
    "a test image": (
        lambda root: change(root / "test/dog/1.pgm"),
        "as many test images, of other content, labels or order",
    ),
    "labels": (
        lambda root: (root / "train/dog/0.pgm").rename(root / "train/cat/9.pgm"),
        "as many train images, of other content, labels or order",
    ),
    "order": (
        lambda root: swap(root / "train/dog/0.pgm", root / "train/dog/1.pgm"),
        "as many train images, of other content, labels or order",
    ),
}
PARTS = ("train", "test")


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_named(tmp_path, what):
    root = pictures(tmp_path / "data", "cat", "dog")
    before = identity(root)
    alter, said = CHANGES[what]
    alter(root)
    with pytest.raises(UserError, match=f"^run x: made from .*: {said}; give another --run_name$"):
        check(identity(root), before)
    if "test" in said:
        check(identity(root), before, splits=("train",))  # experts do not see them


def test_where_images_lie_does_not_matter(tmp_path):
    before = identity(pictures(tmp_path / "data", "cat", "dog"))
    copy = Path(shutil.copytree(tmp_path / "data", tmp_path / "elsewhere"))
    for number in range(3):
        (copy / f"train/cat/{number}.pgm").rename(copy / f"train/cat/image_{number}.pgm")
    now = identity(copy, res=16)
    check(now, before)
    assert now.parts == before.parts and now.path != before.path
    test_only = identity_of(find_dataset("folder", data_path=copy, splits=("test",)), str(copy))
    check(test_only, before)


def test_what_is_held_out_counts(tmp_path):
    root = pictures(tmp_path / "data", "cat", "dog")
    with pytest.raises(UserError, match="4 train images instead of 6"):
        check(identity(root, val_fraction=0.3), identity(root))
    check(identity(root, val_fraction=0.3), identity(root, val_fraction=0.3))


def test_the_identity_of_known_images_stays(tmp_path):
    """Another one would refuse all that was made before."""
    mine = identity(pictures(tmp_path / "data", "cat", "dog"))
    digits = identity_of(find_dataset("digits", res=16), "data")
    assert {split: part.digest for split, part in mine.parts.items()} == {
        "train": "07f2638534995dd031d6a3c463cc8357",
        "test": "9d88023b5bc67d2b585da22f31d3c9d0",
    }
    assert digits.parts["train"].digest == "0ee53afcf35af489686115218142a4e6"
    assert digits.class_names == ()


def test_hashes_are_kept(tmp_path, monkeypatch):
    root = pictures(tmp_path / "data", "cat", "dog")
    before = identity(root)
    monkeypatch.setattr("utils.data.decode._hash_one", None)
    assert identity(root) == before


def test_the_main_process_alone_reads(monkeypatch):
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    monkeypatch.setattr(ranks, "from_main", lambda value: value or "sent")
    assert identity_of(None, "data") == "sent"


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: [],
        lambda values: values | {"parts": {"train": {"images": 3}}},
        lambda values: values | {"parts": {"train": {"images": 3, "digest": 7}}},
        lambda values: values | {"class_names": "cat"},
        lambda values: {name: values[name] for name in values if name != "classes"},
    ],
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    mine = identity(pictures(tmp_path / "data", "cat", "dog"))
    with pytest.raises(UserError, match=r"^run x: its record of images is damaged; mend it$"):
        mine.check_same_as(damage(mine.to_dict()), ("train",), what="run x", advice="mend it")


def test_begun_experts_of_other_images_are_not_lost(tmp_path):
    one, other = (
        identity(pictures(tmp_path / name, "cat", "dog", seed=seed))
        for seed, name in enumerate(("a/data", "b/data"))
    )
    folder = tmp_path / "buffers"
    begin(folder, {"lr_teacher": 0.01}, images=one)
    begin(folder, {"lr_teacher": 0.01}, images=other)  # nothing was begun on the first
    begin(folder, {"lr_teacher": 0.01}, images=one)
    torch.save({}, unfinished_file(folder, 0))
    assert holds_experts(folder)
    with pytest.raises(UserError, match=OTHERS + "as many train images"):
        begin(folder, {"lr_teacher": 0.01}, images=other)
    assert unfinished_file(folder, 0).exists()


# the three scripts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Experts and a run on the pictures of a/data; others lie in b/data."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("ab"):
        pictures(root / name / "data", "cat", "dog", seed=seed)
    train(root, "a")
    distill(root, "a")
    return root


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


def train(root, data, *arguments):
    few = "--num_experts 1 --train_epochs 2".split()
    where = ["--data_path", str(root / data / "data"), "--buffer_path", str(root / "buffers")]
    return buffer.main([*MINE, *few, *where, *arguments])


def distill(root, data, *arguments):
    where = ["--data_path", str(root / data / "data"), "--buffer_path", str(root / "buffers")]
    where += ["--save_path", str(root / "results"), "--run_name", "run"]
    return distill_att.main([*SHORT, *MINE, *where, "--lr_lr", "0", *arguments])


def measure(root, data, *arguments):
    distilled = run_of(root) / "distilled_best.pt"
    short = "--num_eval 1 --epoch_eval_train 2".split()
    where = ["--distilled", str(distilled), "--data_path", str(root / data / "data")]
    return evaluation.main([*short, *where, *arguments])


def run_of(root):
    return root / "results/folder/ConvNetD1/ipc1/run"


def experts_of(root):
    return root / "buffers/folder/data/8/ConvNetD1"


def left_behind(root):
    """All files outside of the data sets, with their times."""
    folders = (root / "buffers", root / "results")
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*.*")}


def forget_images(root, *, experts=False, run=False):
    """Make files as earlier versions did, and other codes."""
    if experts:
        path = experts_of(root) / "experts.json"
        settings = json.loads(path.read_text())
        del settings["data"]
        path.write_text(json.dumps(settings))
    for path in run_of(root).glob("*.pt") if run else ():
        content = torch.load(path, weights_only=True)
        del content["data"]
        torch.save(content, path)


@pytest.mark.parametrize(
    ("call", "forgotten", "what"),
    [
        (lambda root: train(root, "b"), False, "experts in"),
        (lambda root: train(root, "b", "--num_experts", "2"), False, "experts in"),
        (lambda root: distill(root, "b"), False, "experts in"),
        (lambda root: distill(root, "b", "--run_name", "new"), False, "experts in"),
        (lambda root: distill(root, "b"), True, "run"),
        (lambda root: measure(root, "b"), False, "set"),
        (lambda root: measure(root, "b", "--other_test", "--herding"), False, "set"),
    ],
)
def test_other_images_are_refused(copied, call, forgotten, what):
    forget_images(copied, experts=forgotten)
    before = left_behind(copied)
    with pytest.raises(UserError, match=rf"^{what} \S*: {OTHERS}as many") as refusal:
        call(copied)
    assert "\n" not in str(refusal.value)
    assert left_behind(copied) == before


def test_other_classes_are_named_with_both_sides(copied):
    other = pictures(copied / "c/data", "cat", "fox")
    with pytest.raises(UserError) as refusal:
        measure(copied, "c")
    distilled = run_of(copied) / "distilled_best.pt"
    assert str(refusal.value) == (
        f"set {distilled}: the test images of {other} are of other classes: class fox instead of "
        "dog; give the --data_path that it is from"
    )


def test_all_that_is_made_carries_the_identity(made):
    root = made / "a/data"
    ours = identity(root).to_dict()
    run = run_of(made)
    assert json.loads((experts_of(made) / "experts.json").read_text())["data"] == ours
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == ours
    for name in ("checkpoint.pt", "distilled_0.pt", "distilled_best.pt"):
        assert torch.load(run / name, weights_only=True)["data"] == ours


def test_moved_images_are_the_same(copied):
    (copied / "c").mkdir()
    (copied / "a/data").rename(copied / "c/data")
    assert train(copied, "c", "--num_experts", "2", "--dry_run") == 0
    assert measure(copied, "c", "--herding", "--dry_run") == 0
    assert distill(copied, "c", "--Iteration", "5", "--eval_it", "0") == 0
    assert torch.load(run_of(copied) / "checkpoint.pt")["state"]["iteration"] == 5


def test_files_that_carry_none_are_used_and_a_line_says_so(copied, capsys):
    forget_images(copied, experts=True, run=True)
    unknown = f"made from images that are not recorded, taken for those of {copied}/a/data"
    assert train(copied, "a") == 0
    assert f"experts in {experts_of(copied)}: {unknown}\n" in capsys.readouterr().out
    assert distill(copied, "a", "--Iteration", "5", "--eval_it", "0") == 0
    said = capsys.readouterr().out
    assert f"experts in {experts_of(copied)}: {unknown}\n" in said
    assert f"run {run_of(copied)}: {unknown}\n" in said
    assert measure(copied, "a", "--dry_run") == 0
    assert f"distilled_best.pt: {unknown}\n" in capsys.readouterr().out


def test_other_test_images_are_measured_on_request_and_recorded_as_such(copied):
    shutil.rmtree(copied / "b/data/train")
    assert measure(copied, "a", "--other_test") == 0  # they are the same
    assert measure(copied, "b", "--other_test") == 0
    same, other = json.loads((run_of(copied) / "eval.json").read_text())
    assert "other_test" not in same and other["other_test"] is True
    parts = [each["data"]["parts"]["test"]["digest"] for each in (same, other)]
    assert parts == [
        identity(copied / f"{name}/data", splits=("test",)).parts["test"].digest for name in "ab"
    ]


def test_measurements_on_other_test_images_are_no_result_of_a_run(tmp_path):
    evaluations = [entry(0.5, 0.5), entry(0.9, 0.9, 0.9, other_test=True)]
    run = write_run(tmp_path / "run", [], evaluations=evaluations, Iteration=0)
    (row,) = measured(read_run(run))
    assert row["mean"] == 50
