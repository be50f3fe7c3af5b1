"""Images held out of the training set, and the best iteration chosen on them."""

import json
import re

import pytest
import torch
from short_runs import SHORT, distill, images, records, train_experts, without_costs

import distill_att
import eval as evaluation
from utils.core.errors import UserError
from utils.data.dataset import find_dataset, load_dataset, read_dataset
from utils.data.real_images import random_real_images
from utils.measure.protocol import Accuracies

VAL = ["--val_fraction", "0.5"]
RUN = "digits/ConvNetD1/ipc1/run"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Experts that have not seen half of the digits."""
    return train_experts(tmp_path_factory.mktemp("held_out"), 1, *VAL)


@pytest.fixture
def accuracies(monkeypatch):
    """Test and validation accuracy of the raw set, then of the average, at three evaluations; those
    of the first are the best on the test images, of the second on those held out.
    """
    pairs = iter([(0.9, 0.2), (0.5, 0.5), (0.8, 0.7), (0.7, 0.4), (0.7, 0.3), (0.6, 0.6)])

    def measured(*args, val, **kwargs):
        on_test, on_val = next(pairs)
        return Accuracies((on_test,), None if val is None else Accuracies((on_val,)))

    monkeypatch.setattr("utils.run.recorder.evaluate", measured)


def test_a_run_with_images_held_out(held_out, tmp_path, capsys):
    """All of it: experts, distillation, and evaluation on what is left."""
    run_dir = distill(held_out, tmp_path, *VAL, "--select", "val")
    assert (held_out / "digits_VAL0.5/ConvNetD1").is_dir()
    out = capsys.readouterr().out
    assert "distilled_best.pt: best so far, chosen on the images held out" in out
    assert re.search(
        r"iteration +0  raw .*\(n=2\)  held out .*%.*\(n=2\)  best so far, chosen", out
    )
    evals = records(run_dir, "eval")
    for record in evals:
        assert list(record)[-3:] == ["val_mean", "val_std", "val_accs"]
        assert record["val_mean"] == pytest.approx(sum(record["val_accs"]) / 2)
    assert [record["val_accs"] for record in evals] != [record["accs"] for record in evals]
    for name, tag in (("raw", "best"), ("ema", "ema_best")):
        best = max((r for r in evals if r["set"] == name), key=lambda r: r["val_mean"])
        saved = torch.load(run_dir / f"distilled_{tag}.pt", weights_only=True)
        assert saved["iteration"] == best["iteration"]

    rest = load_dataset("digits", val_fraction=0.5)
    seen = []

    def spy(images, labels, *args, **kwargs):
        seen.append(len(labels))
        return Accuracies((0.5,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", spy)
        few = ["--num_eval", "1", "--epoch_eval_train", "1"]
        evaluation.main(["--distilled", str(run_dir / "distilled_best.pt"), *few, "--full"])
    assert seen == [10, len(rest.train.labels)]


def test_training_images_are_read_once_for_both_parts():
    source, reads = find_dataset("digits", val_fraction=0.5), []
    read = source.read["train"]
    source.read["train"] = lambda: reads.append("train") or read()
    data = read_dataset(source, val=True)
    assert reads == ["train"]
    assert len(data.train.images) + len(data.val.images) == 1437


@pytest.mark.parametrize(("select", "raw", "ema"), [("test", 0, 2), ("val", 2, 4), ("last", 4, 4)])
def test_the_best_is_the_one_selected(held_out, tmp_path, accuracies, capsys, select, raw, ema):
    run_dir = distill(held_out, tmp_path, *VAL, "--select", select)
    for tag, iteration in (("best", raw), ("ema_best", ema)):
        saved = torch.load(run_dir / f"distilled_{tag}.pt", weights_only=True)
        assert saved["iteration"] == iteration
    said = {"test": "on the test set", "val": "on the images held out", "last": "kept as best"}
    assert said[select] in capsys.readouterr().out


def test_selection_goes_on_where_a_run_was(held_out, tmp_path, accuracies):
    """Of 0.2, 0.7 and 0.3 on the images held out the second stays the best after a break."""
    flags = [*VAL, "--select", "val"]
    distill(held_out, tmp_path, *flags, "--Iteration", "2")
    run_dir = distill(held_out, tmp_path, *flags)
    assert torch.load(run_dir / "distilled_best.pt", weights_only=True)["iteration"] == 2
    with pytest.raises(UserError, match=r"begun with select=val, not test"):
        distill(held_out, tmp_path, *VAL)


def test_a_run_from_before_there_was_a_choice_keeps_its_best(experts, finished, tmp_path):
    run_dir = tmp_path / RUN
    distill(experts, tmp_path, "--Iteration", "2")
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name in ("select", "val_fraction", "flat"):
        del checkpoint["config"][name]
    del checkpoint["measured_by"]["select"]
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    distill(experts, tmp_path)
    assert without_costs(run_dir) == without_costs(finished)
    assert torch.equal(
        images(run_dir / "distilled_best.pt"), images(finished / "distilled_best.pt")
    )


def test_selection_without_images_held_out_is_refused(experts, tmp_path):
    argv = [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path)]
    with pytest.raises(UserError, match=r"--val_fraction .* buffer\.py and distill_att\.py alike"):
        distill_att.main([*argv, "--select", "val"])


def test_experts_that_have_seen_the_images_held_out_are_not_taken(experts, held_out, tmp_path):
    argv = [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path), *VAL]
    with pytest.raises(UserError, match=r"no expert buffers in .*digits_VAL0\.5/.*--val_fraction"):
        distill_att.main(argv)
    argv[argv.index(str(experts))] = str(held_out)
    with pytest.raises(UserError, match=r"digits_VAL0\.2/"):
        distill_att.main([*argv[:-1], "0.2"])
    assert json.loads((held_out / "digits_VAL0.5/ConvNetD1/experts.json").read_text())[
        "val_fraction"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize("fraction", [0.1, 1e-6, 0.999])
def test_a_part_of_every_class_is_held_out(fraction):
    whole, divided = load_dataset("digits"), load_dataset("digits", val_fraction=fraction)
    train, val = divided.train.labels.bincount(), divided.val.labels.bincount()
    total = whole.train.labels.bincount()
    assert torch.equal(train + val, total)
    wanted = (fraction * total).round().clamp(min=1).minimum(total - 1)
    assert torch.equal(val, wanted.long())
    assert torch.equal(divided.test.labels, whole.test.labels)

    def scans(*splits):
        pixels = [divided.normalisation.inverse(split.images) for split in splits]
        return sorted(bytes((image * 255).round().byte().flatten()) for image in torch.cat(pixels))

    before = whole.normalisation.inverse(whole.train.images)
    assert scans(divided.train, divided.val) == sorted(
        bytes((image * 255).round().byte().flatten()) for image in before
    )


def test_what_is_held_out_is_the_same_every_time_and_kept_out_of_the_fit():
    first, second = (load_dataset("digits", val_fraction=0.3) for _ in range(2))
    assert torch.equal(first.val.images, second.val.images)
    # Standardised by what is left alone: its mean is 0 and its deviation 1.
    assert first.train.images.mean().abs() < 1e-5
    assert first.train.images.std() == pytest.approx(1, abs=1e-4)
    assert first.val.images.mean().abs() > 1e-4
    drawn = random_real_images(first, 50, torch.Generator().manual_seed(0))
    there = {image.numpy().tobytes() for image in first.train.images}
    assert {image.numpy().tobytes() for image in drawn} <= there


def test_without_a_fraction_nothing_is_held_out():
    assert load_dataset("digits").val is None
    source = find_dataset("digits", val_fraction=0.1)
    assert read_dataset(source).val is None
    assert read_dataset(source, val=True).to("meta").val.images.is_meta
