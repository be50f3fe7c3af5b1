"""The three scripts on digits: as a user types them, and with bad input."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from short_runs import (
    ROOT,
    SHORT,
    distill,
    images,
    records,
    run,
    snapshots,
    train_experts,
    without_costs,
)

import buffer
import distill_att
import eval as evaluation
from utils.config.resolve import Resolved
from utils.core.errors import UserError
from utils.options import BufferOptions


def test_as_a_user_types_them(tmp_path):
    """Experts in two calls, distillation, evaluation of a moved file: each its own process."""
    where = ["--buffer_path", tmp_path / "b", "--dataset", "digits", "--model", "ConvNetD1"]
    for number in (1, 2):
        made = run("buffer.py", *where, "--num_experts", number, "--train_epochs", 2)
        assert made.returncode == 0, made.stderr
        assert f"{number - 1} of {number} experts are in" in made.stdout
    few = ["--num_eval", 1, "--epoch_eval_train", 2]
    start = [*where, *few, "--save_path", tmp_path / "r", "--run_name", "x"]
    start += ["--Iteration", 2, "--syn_steps", 2, "--expert_epochs", 1]
    refused = run("distill_att.py", *start, "--max_start_epoch", 3)
    assert refused.returncode == 2  # from epoch 2 on one more is beyond the two of the experts
    assert re.fullmatch(r"distill_att\.py: error: [^\n]*max_start_epoch[^\n]*\n", refused.stderr)
    assert refused.stdout == ""
    done = run("distill_att.py", *start, "--max_start_epoch", 2)
    assert done.returncode == 0, done.stderr
    assert "configs/digits/ipc1.yaml" in done.stdout

    moved = tmp_path / "elsewhere" / "my_digits.pt"
    moved.parent.mkdir()
    shutil.copy(tmp_path / "r/digits/ConvNetD1/ipc1/x/distilled_best.pt", moved)
    measured = run("eval.py", "--distilled", moved, *few, cwd=moved.parent)
    assert measured.returncode == 0, measured.stderr
    assert re.search(r"distilled raw +ConvNetD1 .*%", measured.stdout)
    assert (moved.parent / "eval.json").exists()


def test_buffer_is_called_from_python(experts):
    options = BufferOptions(
        dataset="digits",
        model="ConvNetD1",
        num_experts=2,
        train_epochs=2,
        buffer_path=str(experts),
    )
    assert buffer.run(Resolved.of(options)) == experts / "digits/ConvNetD1"
    with pytest.raises(UserError, match="--rho is for sharpness-aware steps: leave it out"):
        buffer.main(["--dataset", "digits", "--no_flat", "--rho", "0.5"])


def test_eval_mode_m_leaves_out_what_does_not_fit(experts, tmp_path, capsys):
    argv = [*SHORT, "--buffer_path", experts, "--save_path", tmp_path, "--eval_mode", "M"]
    assert distill_att.main([*map(str, argv), "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "--eval_mode M" in line]
    assert len(lines) == 2 and all(line.endswith("left out") for line in lines)


def test_a_deleted_buffer_file_is_made_again(experts, tmp_path):
    train_experts(tmp_path, 2, "--save_interval", "1")
    (tmp_path / "digits/ConvNetD1/replay_buffer_0.pt").unlink()
    train_experts(tmp_path, 2, "--save_interval", "1")
    pairs = list(zip(snapshots(tmp_path), snapshots(experts), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_diverging_expert_is_not_kept(tmp_path):
    with pytest.raises(UserError, match=r"expert 0 diverged in epoch \d: lower --lr_teacher"):
        train_experts(tmp_path, 1, "--lr_teacher", "1e9")
    assert snapshots(tmp_path) == []


def test_a_finished_buffer_is_left_alone(experts):
    (file,) = experts.rglob("replay_buffer_*.pt")
    before = file.stat().st_mtime_ns
    train_experts(experts, 2)
    assert file.stat().st_mtime_ns == before


def test_experts_from_elsewhere_are_complete_or_refused(experts, tmp_path):
    shutil.copytree(experts, tmp_path / "b")
    (tmp_path / "b/digits/ConvNetD1/experts.json").unlink()
    train_experts(tmp_path / "b", 2)
    with pytest.raises(UserError, match=r"not from this buffer.*another --buffer_path"):
        train_experts(tmp_path / "b", 3)


def test_the_files_of_a_run(finished):
    tags = ["0", "2", "4", "last", "best", "ema_last", "ema_best"]
    names = {f"distilled_{tag}.pt" for tag in tags} | {f"images_{tag}.png" for tag in tags}
    names |= {"config.yaml", "metrics.jsonl", "checkpoint.pt", ".lock"}
    assert {path.name for path in finished.iterdir()} == names
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["syn_steps"], config["model"], config["lr_img"]) == (4, "ConvNetD1", 3.0)
    (environment,) = config["environment"]
    assert {"torch", "git_commit", "device", "command"} <= set(environment)
    assert Image.open(finished / "images_best.png").width > 400


def test_the_log_of_a_run(finished):
    steps, evals = records(finished, "step"), records(finished, "eval")
    keys = ["kind", "iteration", "loss", "length", "n_opt", "start_epoch", "syn_lr", "seconds"]
    assert all(list(record) == keys for record in steps)
    assert [record["iteration"] for record in steps] == [0, 1, 2, 3]
    assert all(1 <= record["length"] == record["n_opt"] <= 4 for record in steps)
    keys = ["kind", "iteration", "set", "model", "acc_mean", "acc_std", "accs"]
    assert all(list(record) == keys for record in evals)
    order = [(record["iteration"], record["set"]) for record in evals]
    assert order == [(i, s) for i in (0, 2, 4) for s in ("raw", "ema")]
    for record in evals:
        assert record["acc_mean"] == pytest.approx(sum(record["accs"]) / 2)


def test_best_is_kept_per_set(finished):
    for tag, name in (("best", "raw"), ("ema_best", "ema")):
        best = max(
            (r for r in records(finished, "eval") if r["set"] == name), key=lambda r: r["acc_mean"]
        )
        saved = torch.load(finished / f"distilled_{tag}.pt", weights_only=True)
        assert (saved["set"], saved["iteration"]) == (name, best["iteration"])


def test_the_images_move_and_the_average_follows(finished):
    first, last = images(finished / "distilled_0.pt"), images(finished / "distilled_last.pt")
    average = images(finished / "distilled_ema_last.pt")
    assert not torch.equal(first, last)
    assert (average - first).norm() < (last - first).norm()


def test_same_seed_same_result(finished, experts, tmp_path):
    again = distill(experts, tmp_path)
    assert without_costs(again) == without_costs(finished)
    for tag in ("last", "ema_last", "best", "ema_best"):
        name = f"distilled_{tag}.pt"
        assert torch.equal(images(again / name), images(finished / name))


def test_another_seed_another_result(finished, experts, tmp_path):
    other = distill(experts, tmp_path, "--seed", "4")
    assert not torch.equal(images(other / "distilled_0.pt"), images(finished / "distilled_0.pt"))


def test_a_run_is_not_continued_under_other_settings(finished, experts):
    results = finished.parents[3]
    with pytest.raises(UserError, match=r"lr_img=3.0, not 9.0.*--run_name"):
        distill(experts, results, "--lr_img", "9")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished, experts, tmp_path):
    run_dir = tmp_path / "digits/ConvNetD1/ipc1/run"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"kind": "eval", "iteration": 0, "set": "raw"}\n{"ki')
    assert without_costs(distill(experts, tmp_path)) == without_costs(finished)


def test_a_run_without_its_checkpoint_is_not_overwritten(finished, experts, tmp_path):
    shutil.copytree(finished, tmp_path / "digits/ConvNetD1/ipc1/run")
    (tmp_path / "digits/ConvNetD1/ipc1/run/checkpoint.pt").unlink()
    with pytest.raises(UserError, match=r"without a checkpoint.*--run_name"):
        distill(experts, tmp_path)


def test_a_damaged_checkpoint_is_named(finished, experts, tmp_path):
    checkpoint = tmp_path / "digits/ConvNetD1/ipc1/run/checkpoint.pt"
    shutil.copytree(finished, checkpoint.parent)
    checkpoint.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged.*another --run_name"):
        distill(experts, tmp_path)
    torch.save([1], checkpoint)
    with pytest.raises(UserError, match=r"checkpoint\.pt is no checkpoint.*another --run_name"):
        distill(experts, tmp_path)


def test_a_run_is_not_continued_with_other_experts(experts, tmp_path):
    shutil.copytree(experts, tmp_path / "b")
    half = distill(tmp_path / "b", tmp_path / "r", "--Iteration", "2", "--eval_it", "0")
    train_experts(tmp_path / "b", 3)
    with pytest.raises(UserError, match=r"begun with 2 experts, now there are 3.*--max_experts 2"):
        distill(tmp_path / "b", tmp_path / "r", "--eval_it", "0")
    distill(tmp_path / "b", tmp_path / "r", "--eval_it", "0", "--max_experts", "2")
    assert [record["iteration"] for record in records(half, "step")] == [0, 1, 2, 3]


def test_the_best_of_another_protocol_does_not_count(experts, tmp_path):
    distill(experts, tmp_path, "--Iteration", "2", "--epoch_eval_train", "40")
    whole = distill(experts, tmp_path)
    best = max(
        (r for r in records(whole, "eval") if r["set"] == "raw" and r["iteration"] > 2),
        key=lambda record: record["acc_mean"],
    )
    assert torch.load(whole / "distilled_best.pt", weights_only=True)["iteration"] == 4
    assert best["iteration"] == 4


@pytest.mark.parametrize("flags", [[], ["--micro_batch", "3"]], ids=["whole", "pieces"])
def test_both_engines_give_the_same_run(finished, experts, tmp_path, capsys, flags):
    """`finished` is short enough for the full graph, which auto then takes."""
    other = distill(experts, tmp_path, "--unroll", "adjoint", *flags)
    assert "unroll auto" not in capsys.readouterr().out
    lengths = [[r["length"] for r in records(d, "step")] for d in (other, finished)]
    assert lengths[0] == lengths[1]
    torch.testing.assert_close(
        images(other / "distilled_last.pt"),
        images(finished / "distilled_last.pt"),
        rtol=1e-2,
        atol=1e-2,
    )  # float32; tests/test_unroll.py has the proof in float64


def test_auto_is_what_it_was_when_a_run_is_continued(experts, tmp_path, capsys):
    half = distill(experts, tmp_path, "--Iteration", "2", "--unroll", "adjoint")
    recorded = torch.load(half / "checkpoint.pt", weights_only=True)["how"]
    capsys.readouterr()
    distill(experts, tmp_path)
    assert "unroll auto" not in capsys.readouterr().out
    assert torch.load(half / "checkpoint.pt", weights_only=True)["how"] == recorded


def test_several_trajectories_are_logged_as_lists(experts, tmp_path):
    run_dir = distill(experts, tmp_path, "--trajectories", "2", "--eval_it", "0")
    for record in records(run_dir, "step"):
        assert len(record["length"]) == len(record["n_opt"]) == len(record["start_epoch"]) == 2


def test_late_start_epochs(tmp_path):
    train_experts(tmp_path, 1, "--train_epochs", "4")
    where = SHORT.index("--max_start_epoch")
    argv = [*SHORT[:where], *SHORT[where + 2 :], "--start_epochs", "1", "3"]
    argv += ["--current_max_start_epoch", "2", "--expansion_end_epoch", "2", "--eval_it", "0"]
    argv += ["--buffer_path", str(tmp_path), "--save_path", str(tmp_path), "--run_name", "run"]
    assert distill_att.main([*argv, "--Iteration", "8", "--syn_steps", "1"]) == 0
    starts = [r["start_epoch"] for r in records(tmp_path / "digits/ConvNetD1/ipc1/run", "step")]
    assert starts[:2] == [1, 1]
    assert set(starts) == {1, 2}


@pytest.mark.parametrize("trajectories", [1, 2])
def test_distance_curves_are_logged_on_demand(experts, tmp_path, trajectories):
    flags = ["--trajectories", trajectories, "--length", "fixed", "--eval_it", 0]
    run_dir = distill(experts, tmp_path, *map(str, flags), "--log_distances", "3")
    steps, curves = records(run_dir, "step"), records(run_dir, "distances")
    assert [record["iteration"] for record in curves] == [0, 3]
    for record in curves:
        step = steps[record["iteration"]]
        assert all(record[name] == step[name] for name in ("length", "n_opt", "start_epoch"))
        l1, l2 = (np.atleast_2d(record[name]) for name in ("l1", "l2"))
        assert l1.shape == l2.shape == (trajectories, 4)
        assert (l2.argmin(1) + 1).tolist() == np.atleast_1d(record["n_opt"]).tolist()
        assert (l1**2 > l2).all()  # of any vector with more than one entry


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient", "tesla", "--length", "fixed"],
        ["--prune_threshold", "0.5"],
    ],
    ids=["TESLA", "PP"],
)
def test_the_rivals_run_and_go_on(finished, experts, tmp_path, flags):
    """They differ from ATT, and cut off at the half as little from themselves."""
    flags = [*flags, "--eval_it", "0"]
    whole = distill(experts, tmp_path / "whole", *flags)
    half = distill(experts, tmp_path / "half", *flags, "--Iteration", "2")
    distill(experts, tmp_path / "half", *flags)
    assert without_costs(half) == without_costs(whole)
    assert torch.equal(images(half / "distilled_last.pt"), images(whole / "distilled_last.pt"))
    assert not torch.equal(
        images(whole / "distilled_last.pt"), images(finished / "distilled_last.pt")
    )


def test_fixed_length(finished, experts, tmp_path):
    fixed = distill(experts, tmp_path, "--length", "fixed", "--eval_it", "0")
    steps = records(fixed, "step")
    assert [record["length"] for record in steps] == [4] * 4
    assert steps[0]["n_opt"] == records(finished, "step")[0]["n_opt"]
    assert records(fixed, "eval") == []
    assert (fixed / "distilled_last.pt").exists()


def test_a_saved_configuration_can_be_used_again(finished, experts, tmp_path):
    again = distill(experts, tmp_path, "--config", str(finished / "config.yaml"))
    assert torch.equal(images(again / "distilled_last.pt"), images(finished / "distilled_last.pt"))


def test_experts_of_the_other_kind_serve_where_the_yaml_asks_for_zca(experts, tmp_path, capsys):
    """As with `buffer.py --dataset CIFAR10` and the row of distill_att.py."""
    row = tmp_path / "row.yaml"
    row.write_text("zca: true\nmodel: ConvNetD1\nlr_img: 3\n")
    made = distill(experts, tmp_path, "--config", str(row), "--eval_it", "0")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "only other experts" in line]
    assert "python buffer.py --dataset digits" in line
    assert "--zca" in line
    assert torch.load(made / "distilled_last.pt", weights_only=True)["zca"] is False
    with pytest.raises(UserError, match=r"make them with: python buffer\.py .*--zca"):
        distill(experts, tmp_path / "b", "--config", str(row), "--zca")


def test_a_diverging_run_stops_with_the_last_good_set(experts, tmp_path, capsys):
    argv = [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path)]
    argv += ["--run_name", "run", "--eval_it", "0", "--lr_lr", "1e6"]
    assert distill_att.main(argv) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(r"stopped at iteration \d+: syn_lr became .*lower --lr_lr", line)
    run_dir = tmp_path / "digits/ConvNetD1/ipc1/run"
    (record,) = records(run_dir, "diverged")
    assert record["rate"] == "lr_lr" and record["reason"] in line
    assert record["iteration"] == len(records(run_dir, "step"))
    saved = torch.load(run_dir / "distilled_last.pt", weights_only=True)
    assert saved["syn_lr"] > 0
    assert saved["images"].isfinite().all()


def test_eval_with_real_images_beside(finished, tmp_path, capsys):
    file = shutil.copy(finished / "distilled_best.pt", tmp_path)
    argv = ["--distilled", str(file), "--random", "--full", "--num_eval", "2"]
    argv += ["--epoch_eval_train", "2", "--epoch_full_train", "1", "--model", "MLP", "ConvNetD1"]
    assert evaluation.main(argv) == 0
    table = capsys.readouterr().out
    for row in ("distilled raw", "random real", "full"):
        for model in ("MLP", "ConvNetD1"):
            assert re.search(rf"{row} +{model} ", table)
    record = json.loads((tmp_path / "eval.json").read_text())
    assert len(record) == 6
    assert all(len(entry["accs"]) == 2 for entry in record)


def test_a_recorded_evaluation_is_not_repeated(finished, tmp_path, capsys):
    file = shutil.copy(finished / "distilled_best.pt", tmp_path)
    argv = ["--distilled", str(file), "--num_eval", "1", "--epoch_eval_train", "2"]
    assert evaluation.main(argv) == 0
    first = capsys.readouterr().out
    assert evaluation.main(argv) == 0
    assert "recorded before" in capsys.readouterr().out
    assert "recorded before" not in first
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 1
    assert evaluation.main([*argv, "--seed", "1"]) == 0
    assert len(json.loads((tmp_path / "eval.json").read_text())) == 2


def test_a_recorded_evaluation_is_one_on_the_same_test_images(tmp_path, capsys):
    """Two folders of pictures under the same set: the second is measured, not looked up."""
    for tree, split in itertools.product(("a", "b"), ("train", "test")):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / tree / split / name
            folder.mkdir(parents=True)
            for n in range(2):
                grey = 40 + 150 * label + 3 * n + (20 if tree == "b" else 0)
                Image.new("RGB", (8, 8), (grey, grey, grey + n)).save(folder / f"{n}.png")
    where = ["--dataset", "folder", "--res", "8", "--data_path", str(tmp_path / "a")]
    where += ["--model", "MLP", "--buffer_path", str(tmp_path / "buffers")]
    assert buffer.main([*where, "--num_experts", "1", "--train_epochs", "2"]) == 0
    argv = [*where, *"--Iteration 1 --eval_it 0 --syn_steps 2 --expert_epochs 1".split()]
    argv += ["--max_start_epoch", "1", "--save_path", str(tmp_path / "r"), "--run_name", "x"]
    assert distill_att.main(argv) == 0
    file = tmp_path / "r/folder/MLP/ipc1/x/distilled_last.pt"
    argv = ["--distilled", str(file), "--num_eval", "1", "--epoch_eval_train", "1"]
    for tree, known in (("a", False), ("b", False), ("b", True)):
        capsys.readouterr()
        assert evaluation.main([*argv, "--data_path", str(tmp_path / tree), "--other_test"]) == 0
        assert ("recorded before" in capsys.readouterr().out) is known
    (tmp_path / "b/test/dark").rename(tmp_path / "b/test/black")
    shutil.rmtree(tmp_path / "b/train")
    with pytest.raises(UserError, match=r"class black instead of dark.*--data_path"):
        evaluation.main([*argv, "--data_path", str(tmp_path / "b")])


@pytest.mark.parametrize(
    ("script", "argv", "parts"),
    [
        (buffer, ["--dataset", "digit"], ["--dataset", "'digit'", "digits, CIFAR10"]),
        (buffer, ["--dataset", "digits", "--model", "Conv"], ["--model", "'Conv'", "ConvNetD3"]),
        (buffer, ["--dataset", "digits", "--dsa_strategy", "flip_blur"], ["blur", "flip"]),
        (buffer, ["--dataset", "ImageNet", "--subset", "cats"], ["--subset", "cats", "imagemeow"]),
        (buffer, ["--dataset", "ImageNet"], ["--subset", "imagenette"]),
        (buffer, ["--dataset", "Tiny", "--data_path", "nowhere"], ["nowhere", "train"]),
        (buffer, ["--dataset", "digits", "--num_experts", "0"], ["--num_experts", "at least 1"]),
        (distill_att, ["--dataset", "digits", "--ipc", "0"], ["--ipc", "at least 1"]),
        (distill_att, ["--dataset", "digits", "--micro_batch", "0"], ["--micro_batch", "not 0"]),
        (distill_att, ["--dataset", "digits", "--trajectories", "0"], ["--trajectories", "not 0"]),
        (distill_att, ["--dataset", "digits", "--precision", "fp8"], ["'fp8'", "tf32, bf16"]),
        (distill_att, ["--dataset", "digits", "--compile", "yes"], ["'yes'", "auto, on, off"]),
        (
            distill_att,
            ["--dataset", "digits", "--unroll", "autograd", "--micro_batch", "2"],
            ["--unroll autograd", "--micro_batch"],
        ),
        (buffer, ["--dataset", "digits", "--experts_at_once", "0"], ["--experts_at_once"]),
        (evaluation, ["--distilled", "none.pt", "--eval_at_once", "0"], ["--eval_at_once"]),
        (distill_att, ["--dataset", "digits", "--syn_steps", "0"], ["--syn_steps", "at least 1"]),
        (distill_att, ["--dataset", "digits", "--num_eval", "0"], ["--num_eval", "at least 1"]),
        (distill_att, ["--dataset", ""], ["--dataset", "''", "digits"]),
        (distill_att, ["--dataset", "digits", "--lenght", "att"], ["--lenght"]),
        (distill_att, ["--dataset", "digits", "--config", "no.yaml"], ["no.yaml"]),
        (distill_att, ["--dataset", "digits", "--run_name", "a/b"], ["--run_name", "a/b"]),
        (distill_att, ["--dataset", "digits", "--ipc", "999"], ["--ipc 999", "class 0"]),
        (distill_att, ["--dataset", "digits", "--max_start_epoch", "9"], ["9", "2 epochs"]),
        (distill_att, ["--dataset", "digits", "--start_epochs", "1"], ["FROM and TO", "not 1"]),
        (distill_att, ["--dataset", "digits", "--start_epochs", "2", "2"], ["2 2", "FROM"]),
        (distill_att, ["--dataset", "digits", "--start_epochs", "0", "9"], ["give one of them"]),
        (
            distill_att,
            ["--dataset", "digits", "--current_max_start_epoch", "1"],
            ["--current_max_start_epoch 1", "--expansion_end_epoch 0"],
        ),
        (
            distill_att,
            "--dataset digits --current_max_start_epoch 2 --expansion_end_epoch 9".split(),
            ["--current_max_start_epoch 2", "above 0 and at most 1"],
        ),
        (distill_att, ["--dataset", "digits", "--gradient", "x"], ["--gradient", "exact, tesla"]),
        (distill_att, ["--dataset", "digits", "--prune_threshold", "2"], ["at most 1", "2.0"]),
        (distill_att, ["--dataset", "digits", "--res", "16"], ["no expert buffers", "buffer.py"]),
        (distill_att, ["--dataset", "digits", "--model", "MLP"], ["no expert buffers", "MLP"]),
        (buffer, ["--dataset", "digits", "--res", "200", "--zca"], ["ZCA", "200x200"]),
        (
            buffer,
            ["--dataset", "digits", "--model", "VGG11"],
            ["VGG11 at 8x8", "single values", "--res 32"],
        ),
        (distill_att, ["--dataset", "digits", "--model", "ResNet18"], ["at 8x8", "--res 9 or"]),
        (buffer, "--dataset digits --alpha 0.1 --flat False".split(), ["--alpha", "--no_flat"]),
        (distill_att, ["--dataset", "digits", "--flat"], ["digits_FLAT", "--flat"]),
        (distill_att, ["--dataset", "digits", "--val_fraction", "1"], ["--val_fraction", "1.0"]),
        (buffer, ["--dataset", "digits", "--val_fraction", "-0.1"], ["--val_fraction", "-0.1"]),
        (distill_att, ["--dataset", "digits", "--select", "best"], ["'best'", "test, val, last"]),
        (evaluation, [], ["--distilled"]),
        (evaluation, ["--distilled", "x", "--model", "MLP", "--eval_mode", "M"], ["--eval_mode"]),
        (evaluation, ["--distilled", "none.pt"], ["none.pt"]),
        (evaluation, ["--distilled", "none.pt", "--model", "X"], ["--model", "'X'", "VGG11"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(script, argv, parts, experts, tmp_path):
    if script is not evaluation:
        argv = [*argv, "--buffer_path", str(experts)]
    if script is distill_att:
        short = ["--expert_epochs", "1", "--max_start_epoch", "1", "--save_path", str(tmp_path)]
        argv = [*short, *argv]
    with pytest.raises(UserError) as error:
        script.main(argv)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_buffers_of_another_size_are_named(experts, tmp_path):
    folder = tmp_path / "digits/16/ConvNetD1"
    shutil.copytree(experts / "digits/ConvNetD1", folder)
    argv = ["--dataset", "digits", "--res", "16", "--buffer_path", str(tmp_path)]
    with pytest.raises(UserError, match=r"replay_buffer_0\.pt.*another architecture, image size"):
        distill_att.main(argv)


def test_a_damaged_buffer_is_named_and_skipped_only_if_asked(experts, tmp_path, capsys):
    shutil.copytree(experts, tmp_path / "b")
    (tmp_path / "b/digits/ConvNetD1/replay_buffer_1.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"replay_buffer_1\.pt is damaged.*--skip_bad_buffers"):
        distill(tmp_path / "b", tmp_path / "r")
    distill(tmp_path / "b", tmp_path / "r", "--skip_bad_buffers", "--eval_it", "0")
    assert "replay_buffer_1.pt is damaged" in capsys.readouterr().out


def call_of(script, experts, finished, where):
    """A command line that has work to do and writes into `where`."""
    if script is evaluation:
        shutil.copy(finished / "distilled_best.pt", where)
        return ["--distilled", str(where / "distilled_best.pt"), "--num_eval", "1"]
    if script is buffer:
        return ["--dataset", "digits", "--buffer_path", str(where), "--train_epochs", "1"]
    return [*SHORT, "--buffer_path", str(experts), "--save_path", str(where), "--run_name", "x"]


SCRIPTS = pytest.mark.parametrize("script", [buffer, distill_att, evaluation])


@SCRIPTS
def test_a_dry_run_says_what_it_would_take_and_does_nothing(
    script, experts, finished, tmp_path, capsys
):
    argv = call_of(script, experts, finished, tmp_path)
    before = list(tmp_path.rglob("*"))
    assert script.main([*argv, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"needs about .*B of memory .* free\), .*B of disk in .* free\)", said)
    if script is not evaluation:
        assert re.search(r"dataset +digits +flag\n", said)
        assert re.search(r"(num_experts|lr_img) +\d+(\.0)? +configs/digits/", said)
        assert re.search(r"estimated: about .* left", said)
    assert list(tmp_path.rglob("*")) == before


@SCRIPTS
def test_too_little_disk_is_said_before_the_work(
    script, experts, finished, tmp_path, monkeypatch, caplog
):
    argv = call_of(script, experts, finished, tmp_path)
    monkeypatch.setattr("utils.plan.machine.disk_of", lambda folder: (0, 10))
    before = list(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"too little disk: about .*, or pass --force"):
        script.main(argv)
    assert list(tmp_path.rglob("*")) == before
    assert script.main([*argv, "--force", "--dry_run"]) == 0
    assert "too little disk" in caplog.text


def test_a_call_says_how_long_the_rest_takes(experts, tmp_path, capsys):
    distill(experts, tmp_path, "--Iteration", "6", "--eval_it", "6")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")]
    assert re.fullmatch(r"about .* s an iteration, .* s left with 1 evaluation of about .* s", said)


# Not the peak that getrusage knows, which begins with that of the process that started this one.
PEAK = (
    "import sys, {0}; from pathlib import Path; assert {0}.main(sys.argv[1:]) == 0; "
    "print(Path('/proc/self/status').read_text())"
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("script", [pytest.param("buffer", marks=pytest.mark.slow), "distill_att"])
def test_the_estimated_memory_is_near_the_peak(script, experts, tmp_path):
    few = "--dataset digits --num_experts 1 --train_epochs 1".split()
    argv = {
        "buffer": [*few, "--buffer_path", tmp_path],
        "distill_att": [*SHORT, "--buffer_path", experts, "--save_path", tmp_path],
    }[script]
    command = [sys.executable, "-c", PEAK.format(script), *map(str, argv), "--compile", "off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value, unit = re.search(r"needs about ([\d.]+) (GB|MB) of memory", done.stdout).groups()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    assert 0.8 < float(value) * {"GB": 1e9, "MB": 1e6}[unit] / peak < 1.6
