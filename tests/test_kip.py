"""KIP and Label Solve: against their formulas in float64, runs, evaluation and refusals."""

import re
from dataclasses import replace

import pytest
import torch
from numerics import relative_error
from short_runs import assert_cut_off_goes_on_alike, images, records

import distill_att
import eval as evaluation_script
from scripts.results.evaluations import measured
from scripts.results.runs import read_run
from utils.compute.cost import network_cost
from utils.compute.ntk import Convolutional, FullyConnected
from utils.compute.regression import PIECE_BYTES, centred, least_squares, own_pieces, predict
from utils.core import ranks
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.data.distilled import SyntheticSet
from utils.measure.regression import KernelRegression
from utils.methods.kip import KernelInducingPoints, count_kip
from utils.methods.label_solve import LabelSolve, count_label_solve
from utils.options import DistillOptions
from utils.plan import machine

CLASSES, IPC, REG = 3, 2, 1e-3


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COUNTS = (7, 4, 9)  # training images of each class
TRAIN = Split(some(20, 1, 4, 4), torch.arange(3).repeat_interleave(torch.tensor(COUNTS)))
CLASS_OF = torch.arange(CLASSES).repeat_interleave(IPC)
LEARNED = {"images": some(6, 1, 4, 4, seed=1), "labels": some(6, CLASSES, seed=2)}
KERNELS = [FullyConnected(2), Convolutional(1)]


def make(kernel=KERNELS[0], **keywords):
    return KernelInducingPoints(
        kernel,
        TRAIN,
        CLASS_OF,
        num_classes=CLASSES,
        **{"batch_target": 10, "reg": REG, "seed": 5} | keywords,
    )


def solve(kernel=KERNELS[0], **keywords):
    return LabelSolve(kernel, TRAIN, num_classes=CLASSES, reg=REG, **keywords)


def by_formula(method, kernel, learned):
    """J and its gradients from one graph, with an inverse."""
    leaves = {name: value.clone().requires_grad_() for name, value in learned.items()}
    x, y = leaves["images"], leaves.get("labels", torch.eye(3).double()[CLASS_OF] - 1 / 3)
    targets, wanted = method.draw(4)
    k_ss = kernel(x, x)
    inverse = torch.linalg.inv(k_ss + REG * k_ss.diagonal().mean() * torch.eye(6))
    loss = (kernel(targets, x) @ inverse @ y - wanted).square().mean() / 2
    by = torch.autograd.grad(loss, tuple(leaves.values()))
    return loss.detach(), dict(zip(leaves, by, strict=True))


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("names", [("images",), ("images", "labels")], ids="+".join)
def test_loss_and_gradients_are_those_of_the_formula(kernel, micro_batch, names):
    learned = {name: LEARNED[name] for name in names}
    method = make(kernel, micro_batch=micro_batch)
    step = method.step(4, learned)
    loss, by = by_formula(method, kernel, learned)
    assert relative_error(step.loss, loss) < 1e-9
    assert set(step.grads) == set(names)
    for name in names:
        assert relative_error(step.grads[name], by[name]) < 1e-9


def test_a_batch_has_as_many_images_of_each_class():
    method = make(batch_target=11)
    draws = [method.draw(iteration)[1].argmax(1).bincount().tolist() for iteration in range(9)]
    assert all(sorted(each)[0] >= 3 and sum(each) == 11 for each in draws)
    assert len(set(map(tuple, draws))) > 1  # which classes have one more
    targets, labels = make(batch_target=100).draw(0)
    assert labels.argmax(1).bincount().tolist() == list(COUNTS)  # all that there are
    torch.testing.assert_close(labels.sum(1), torch.zeros(20).double())
    assert targets.unique(dim=0).shape == targets.shape


def test_an_iteration_can_be_repeated_and_others_differ():
    first, again, other = (make().step(i, LEARNED) for i in (2, 2, 3))
    assert torch.equal(first.loss, again.loss) and first.loss != other.loss
    assert torch.equal(first.grads["images"], again.grads["images"])


def test_an_image_that_is_learned_and_a_target_at_once_has_a_finite_gradient():
    learned = {"images": TRAIN.images[[0, 1, 7, 8, 11, 12]].clone()}
    step = make(batch_target=100).step(0, learned)
    assert step.grads["images"].isfinite().all() and step.loss.isfinite()


def test_labels_are_those_of_least_squares():
    kernel = KERNELS[0]
    x, targets = LEARNED["images"], TRAIN.images
    k_ss, k_ts = kernel(x, x), kernel(targets, x)
    matrix = k_ts @ torch.linalg.inv(k_ss + REG * k_ss.diagonal().mean() * torch.eye(6))
    wanted = centred(TRAIN.labels, CLASSES, torch.float64)
    solved = torch.linalg.pinv(matrix) @ wanted
    for size in (None, 1, 7):
        step = solve(micro_batch=size).step(0, LEARNED)
        assert relative_error(LEARNED["labels"] - step.grads["labels"], solved) < 1e-9
        loss = (matrix @ solved - wanted).square().mean() / 2
        assert relative_error(step.loss, loss) < 1e-9


def test_least_squares_of_fewer_rows_than_columns_is_the_shortest():
    k, y = some(3, 5), some(3, 2)
    weights, square = least_squares([(k[:2], y[:2]), (k[2:], y[2:])], k.new_empty(0, 7), columns=5)
    torch.testing.assert_close(weights, torch.linalg.pinv(k) @ y)
    assert square < 1e-20


def test_processes_divide_the_rows(monkeypatch):
    whole = list(own_pieces(10, 4))
    assert whole == [(0, 4), (4, 8), (8, 10)]
    monkeypatch.setattr(ranks, "world", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts += own_pieces(10, 2)
    assert [n for start, end in parts for n in range(start, end)] == list(range(10))


def test_steps_lower_the_loss():
    method, x = make(batch_target=100), LEARNED["images"].clone()
    y, losses = LEARNED["labels"].clone(), []
    for iteration in range(20):
        step = method.step(iteration, {"images": x, "labels": y})
        losses.append(step.loss.item())
        x -= 0.3 * step.grads["images"]
        y -= 0.3 * step.grads["labels"]
    assert losses[-1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True)


def test_a_singular_kernel_is_no_error_but_a_loss_that_is_not_finite():
    k = torch.full((2, 2), torch.nan).double()
    assert predict(k, k, some(2, 3), reg=REG).isnan().all()


def test_work_is_counted():
    cost = network_cost("ConvNetD1", channels=1, num_classes=3, image_size=8)
    options = DistillOptions(method="kip", ipc=2, batch_target=94)
    work, half = (count_kip(options, cost, n, classes=3) for n in (1, 2))
    assert (work.batch, work.whole_batch, half.batch) == (100, 100, 50)
    assert half.flop == work.flop // 2 and half.divides_batches and work.keeps_train
    conv = count_kip(DistillOptions(kernel="conv", kernel_depth=3, ipc=2), cost, classes=3)
    assert conv.image_bytes > 50 * work.image_bytes
    one, two = (count_label_solve(options, cost, n, classes=3) for n in (1, 2))
    assert one.train_flop == 2 * two.train_flop > 0
    with pytest.raises(UserError, match=r"needs images of 16 pixels, these have 8: .* at most 3"):
        count_kip(DistillOptions(kernel="conv", kernel_depth=4), cost, classes=3)


SHORT = (
    "--dataset digits --model ConvNetD1 --ipc 2 --num_eval 1 --epoch_eval_train 1 --compile off "
    "--run_name run"
).split()
SHORT_KIP = "--method kip --Iteration 6 --eval_it 3 --batch_target 50".split()


def distil(folder, *flags):
    """A short run; there are no experts anywhere."""
    paths = ["--save_path", str(folder), "--buffer_path", str(folder / "nowhere")]
    assert distill_att.main([*SHORT, *paths, *flags]) == 0
    return folder / "digits/ConvNetD1/ipc2/run"


@pytest.fixture(scope="module")
def kip_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("kip"), *SHORT_KIP, "--learn_labels")


@pytest.fixture(scope="module")
def solved_run(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("solve"), "--method", "label_solve")


def rows_of(run, capsys, tag="last"):
    """What eval.py prints of a set, and what tables read."""
    path = run / f"distilled_{tag}.pt"
    flags = "--num_eval 2 --epoch_eval_train 2".split()
    assert evaluation_script.main(["--distilled", str(path), *flags]) == 0
    return capsys.readouterr().out, {row["set"]: row for row in measured(read_run(run))}


def test_a_run_learns_images_and_labels(kip_run):
    first, last = (SyntheticSet.load(kip_run / f"distilled_{tag}.pt") for tag in ("0", "last"))
    assert not torch.equal(first.images, last.images)
    torch.testing.assert_close(first.soft_labels, centred(first.labels, 10, torch.float32))
    assert not torch.equal(first.soft_labels, last.soft_labels)
    assert (last.label_form, last.config["kernel"]) == ("centred", "fc")
    assert not {"mom_y", "syn_steps", "unroll"} & set(last.config)
    logged = records(kip_run, "eval")
    assert {record["set"] for record in logged} == {"raw", "ema"}
    assert not any("labels" in record for record in logged)  # networks see the classes alone


def test_a_set_is_evaluated_by_regression_in_a_column_of_its_own(kip_run, capsys):
    out, rows = rows_of(kip_run, capsys)
    lines = [line[:40] for line in out.splitlines()]
    assert sum("distilled raw, kernel regression" in line for line in lines) == 1
    row = rows["raw, kernel regression"]
    assert (row["network"], row["n"], row["epochs"]) == ("NTK-FC1", 1, 0)
    assert row["mean"] > 60 and rows["raw"]["network"] == "ConvNetD1"
    again, _ = rows_of(kip_run, capsys)
    assert again.count("(recorded before)") == 2
    assert read_run(kip_run).method == "KIP"


def test_regression_is_that_of_the_labels_learned(kip_run, tmp_path, capsys):
    content = torch.load(kip_run / "distilled_last.pt", weights_only=True)
    content["soft_labels"] = content["soft_labels"].roll(1, 1)  # every class takes the next one's
    torch.save(content, tmp_path / "distilled_last.pt")
    path = str(tmp_path / "distilled_last.pt")
    assert (
        evaluation_script.main(["--distilled", path, *"--num_eval 1 --epoch_eval_train 2".split()])
        == 0
    )
    found = re.search(r"kernel regression +NTK-FC1 .* ([0-9.]+)%", capsys.readouterr().out)
    assert float(found[1]) < 20


def test_memory_of_regression_is_counted(kip_run):
    """A large kernel of one row needs more than a piece."""
    small = SyntheticSet.load(kip_run / "distilled_last.pt")
    large = replace(
        small,
        images=torch.zeros(500, 3, 32, 32),
        config={"kernel": "conv", "kernel_depth": 3, "reg": REG},
    )
    needs = [KernelRegression.of(each).bytes(each, 10_000) for each in (small, large)]
    assert 10**6 < needs[0] < 2 * PIECE_BYTES < 10**9 < needs[1]


def test_without_learned_labels_the_classes_count(tmp_path, capsys):
    run = distil(tmp_path, *SHORT_KIP)
    last = SyntheticSet.load(run / "distilled_last.pt")
    assert last.soft_labels is None and last.label_form is None
    assert rows_of(run, capsys)[1]["raw, kernel regression"]["mean"] > 60


def test_labels_are_solved_in_one_step(solved_run, capsys):
    first, last = (SyntheticSet.load(solved_run / f"distilled_{tag}.pt") for tag in ("0", "last"))
    assert torch.equal(first.images, last.images) and not list(solved_run.glob("*ema*"))
    assert len(records(solved_run, "step")) == 1
    _, rows = rows_of(solved_run, capsys)
    solved = rows["raw, kernel regression"]["mean"]
    _, rows = rows_of(solved_run, capsys, tag="0")
    by_file = [
        entry["acc_mean"]
        for entry in read_run(solved_run).evaluations
        if "regression" in entry["trained_on"] and entry["distilled"] == "distilled_0.pt"
    ]
    assert solved > 100 * by_file[0] + 3  # than the classes of the same images
    assert read_run(solved_run).method == "Label Solve"


def test_a_second_step_finds_the_same_labels():
    once = LEARNED["labels"] - solve().step(0, LEARNED).grads["labels"]
    again = solve().step(1, LEARNED | {"labels": once}).grads["labels"]
    assert again.abs().max() < 1e-9 * once.abs().max()


def test_images_are_those_of_other_methods(solved_run, tmp_path):
    run = distil(tmp_path, *"--method dm --Iteration 0 --eval_it 0".split())
    assert torch.equal(images(run / "distilled_0.pt"), images(solved_run / "distilled_last.pt"))


def test_a_run_that_is_cut_off_goes_on_alike(kip_run, tmp_path, monkeypatch):
    again = [*SHORT_KIP, "--learn_labels"]
    assert_cut_off_goes_on_alike(lambda: distil(tmp_path, *again), kip_run, monkeypatch)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kernel", "cnn"], ["--kernel", "'cnn'", "fc, conv"]),
        (["--kernel", "conv", "--kernel_depth", "4"], ["--kernel_depth 4", "16 pixels", "most 3"]),
        (["--reg", "0"], ["--reg", "above 0"]),
        (["--lr_y", "1"], ["--lr_y", "--learn_labels"]),
        (["--syn_steps", "2"], ["--syn_steps", "kip"]),
        (["--method", "label_solve", "--pix_init", "noise"], ["--pix_init noise", "real"]),
        (["--method", "label_solve", "--lr_img", "1"], ["--lr_img", "label_solve"]),
        (["--method", "label_solve", "--learn_labels"], ["--learn_labels", "label_solve"]),
        (["--method", "dm", "--kernel", "fc"], ["--kernel", "dm"]),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, parts, tmp_path):
    argv = ["--method", "kip", "--dataset", "digits", "--save_path", str(tmp_path)]
    with pytest.raises(UserError) as error:
        distill_att.main([*argv, *flags])
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kernel": "rbf"}, "config.kernel is not fc or conv"),
        ({"kernel_depth": 0}, "config.kernel_depth is not a whole number above 0"),
        ({"kernel": "conv", "kernel_depth": 4}, "depth 4 does not fit"),
        ({"reg": -1.0}, "config.reg is not a finite number above 0"),
        ({"reg": ...}, "lacks config.reg"),
    ],
    ids=str,
)
def test_damaged_kernels_are_named(kip_run, tmp_path, change, problem):
    content = torch.load(kip_run / "distilled_last.pt", weights_only=True)
    config = content["config"] | change
    config = {name: value for name, value in config.items() if value is not ...}
    torch.save(content | {"config": config}, tmp_path / "set.pt")
    with pytest.raises(UserError, match=problem):
        SyntheticSet.load(tmp_path / "set.pt")


def test_a_kernel_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**9)
    flags = "--method kip --kernel conv --kernel_depth 3 --dataset digits --res 32 --ipc 100"
    argv = [*flags.split(), "--save_path", str(tmp_path), "--pix_init", "noise"]
    with pytest.raises(UserError, match="too little memory") as error:
        distill_att.main(argv)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
