"""What calls cost, counted by hand and measured; what `auto` makes of it; what is said of room."""

import itertools
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml

import buffer
import distill_att
from networks import NETWORKS
from scripts.plan.estimate import distillation_estimate, row_estimate, size_of
from utils.compute import execution
from utils.compute.cost import (
    NetworkCost,
    Training,
    expert_bytes,
    network_cost,
    pieces_within,
)
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.progress import duration, time_left
from utils.data.normalisation import Normalisation
from utils.data.source import Source
from utils.methods.base import Work
from utils.methods.registry import METHODS
from utils.methods.trajectory.family import count_matching
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan import machine as machines
from utils.plan.choose import (
    RunPlan,
    TrainingPlan,
    choose_at_once,
    choose_compile,
    choose_micro_batch,
    choose_unroll,
    evaluations_left,
    plan_run,
    plan_training,
)
from utils.plan.distillation import IMAGE_COPIES, DistillCall, run_bytes
from utils.plan.evaluation import EvalCall
from utils.plan.experts import ExpertsCall, experts_bytes
from utils.plan.machine import A100, CPU_THREAD, GPU, Machine, disk_of, free_bytes, held_bytes
from utils.plan.need import COMPILER_BYTES, CONTEXT_BYTES, STARTED_BYTES
from utils.plan.room import Demand, Disk, Need, check_room, readable
from utils.plan.sizes import DataSize
from utils.run.directory import RunDir

GB, HELD = 10**9, 7_000
SHAPE = {"image_shape": (1, 8, 8)}
COST = NetworkCost(parameters=1_000, layers=4, flop=10_000, activation_bytes=50_000, **SHAPE)
SIZE = DataSize(3, 10, 8, train=600, test=200)
CIFAR10 = {"channels": 3, "num_classes": 10, "image_size": 32}
PLAN = RunPlan(
    compiled=False, unroll="adjoint", micro_batch=10, eval_compiled=False, eval_at_once=1
)
LARGE = replace(PLAN, micro_batch=10_000, eval_at_once=64)
COMPILED, GRAPH = replace(PLAN, compiled=True), replace(PLAN, unroll="autograd")
DISTILL = DistillOptions(dataset="digits", model="ConvNetD2", Iteration=100, eval_it=10)
ROOM = {"free": 80 * GB, "host": 80 * GB, "held": HELD, "say": print}
CPU = Machine("cpu", speed=replace(CPU_THREAD, rate=70e9), **ROOM)
CUDA = Machine("cuda", speed=GPU, **ROOM)


def with_disk(count, on=CPU):
    return replace(on, disk=lambda folder: (0, count))


def source(folder, size=SIZE, *, pictures=False):
    """A data set of so many images, its pixels in memory or decoded from pictures."""
    counts = {"train": size.train, "test": size.test} | ({"val": size.val} if size.val else {})
    files = {split: folder / f"x_8_{split}.pt" for split in ("train", "test")}
    return Source(
        class_names=tuple("0123456789"),
        channels=size.channels,
        image_size=size.image_size,
        labels={split: torch.zeros(count, dtype=torch.int64) for split, count in counts.items()},
        read={},
        cache=folder / "x_8",
        decoded=files if pictures else {},
        name="x",
    )


class Experts:
    """As many as an ExpertBuffer says that it has."""

    epochs = 50

    def __len__(self):
        return 100


def counted(options, cost=COST, processes=1):
    return count_matching(options, cost, processes, classes=10)


def experts_demand(
    folder, on=CPU, *, size=SIZE, missing=range(100), at_once=1, compiled=False, **options
):
    options = BufferOptions(**{"model": "ConvNetD2", "train_epochs": 4} | options)
    plan = TrainingPlan(size.experts_training(options), compiled, at_once)
    call = ExpertsCall(options, size, missing, plan, on)
    return call.demand(source(folder, size), folder / "b")


def distil_call(on=CPU, *, how=PLAN, size=SIZE, iteration=-1, evaluated=-1, **options):
    return DistillCall(replace(DISTILL, **options), size, how, on, iteration, evaluated)


def distil_demand(folder, on=CPU, *, found=None, **call):
    call = distil_call(on, **call)
    return call.demand(found or source(folder, call.size), Experts(), RunDir(folder / "r"))


def distilled(size=SIZE, **whitening):
    """Of a SyntheticSet what a plan looks at."""
    return SimpleNamespace(
        images=torch.zeros(10, size.channels, size.image_size, size.image_size),
        model="ConvNetD2",
        normalisation=Normalisation((0.0,) * 3, (1.0,) * 3, **whitening),
        config={"batch_train": 256},
    )


def eval_demand(folder, on=CPU, *, of=None, size=SIZE, expert_features=None, **options):
    options = {"compile": "off", "distilled": str(folder / "distilled_best.pt")} | options
    call = EvalCall(EvalOptions(**options), of or distilled(size), size)
    return call.demand(source(folder, size), on, expert_features)


def short(demand, on):
    """The one line that refuses the call."""
    with pytest.raises(UserError) as error:
        check_room(demand, on, force=False)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(", or pass --force")
    return message


# What one network costs.


def test_the_arithmetic_of_a_convnet_is_that_by_hand():
    """Three 3x3 convolutions of 128 channels on 32, 16 and 8 pixels a side, then 2048 -> 10."""
    cost = network_cost("ConvNetD3", **CIFAR10)
    products = 32**2 * 128 * 3 * 9 + 16**2 * 128 * 128 * 9 + 8**2 * 128 * 128 * 9 + 2048 * 10
    assert (cost.flop, cost.parameters, cost.layers) == (2 * products, 320_010, 4)
    # of each block what convolution, norm and activation put out, and the pooling of half the side
    outputs = sum(128 * (3 * side**2 + (side // 2) ** 2) for side in (32, 16, 8)) + 10
    assert cost.activation_bytes == 4 * outputs
    # what the field reports of its experts: 6.5 GB for a hundred of 50 epochs
    one = expert_bytes(cost, epochs=50)
    assert one == 51 * 320_010 * 4
    assert round(100 * one / 1e9, 1) == 6.5


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_can_be_counted(model):
    cost = network_cost(model, channels=1, num_classes=10, image_size=256)  # fits all of them
    assert min(cost.parameters, cost.flop, cost.activation_bytes) > 0


def test_a_network_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(
        UserError, match=r"^VGG11 at 16x16 pixels: .* single values .*--res 32 or m"
    ):
        network_cost("VGG11", channels=1, num_classes=10, image_size=16)


def test_counting_takes_no_memory_and_no_random_numbers():
    before = torch.get_rng_state()
    network_cost("VGG11", channels=3, num_classes=10, image_size=2048)  # tens of GB, if it were run
    assert torch.equal(torch.get_rng_state(), before)


def test_training_takes_gradients():
    training = Training(COST, images=7, batch=3, epochs=5)
    assert (training.flop, training.steps, training.layers) == (3 * 10_000 * 7 * 5, 5 * 3, 4)
    flat = replace(training, flat=True)
    assert (flat.flop, flat.steps, flat.layers) == (2 * training.flop, 2 * training.steps, 8)
    # a test holds more where batches are small
    assert SIZE.cohort_bytes(training, at_once=3) == 3 * training.vector_bytes + 200 * 25_000
    assert SIZE.cohort_bytes(replace(training, batch=256), at_once=3) > 3 * 256 * 50_000


def test_pieces_are_equal_and_within_the_limit():
    limits = {1000: [341], 10: [10, 99, 9, 4, 1, 0], 9: [4]}
    sizes = {batch: [pieces_within(batch, n) for n in each] for batch, each in limits.items()}
    assert sizes == {1000: [250], 10: [10, 10, 5, 4, 1, 1], 9: [3]}


# What an outer step of trajectory matching costs.


def test_work_is_proportional_to_images_and_steps():
    one = counted(replace(DISTILL, syn_steps=1))
    many = counted(replace(DISTILL, syn_steps=20, ipc=3))
    assert one.flop > 2 * 3 * 10_000 * 10  # forward and reverse sweep
    assert (many.flop, many.passes) == (60 * one.flop, 20 * one.passes)
    assert counted(replace(DISTILL, batch_syn=4, ipc=3)).batch == 4


def test_only_the_full_graph_grows_with_syn_steps():
    few, many, most = (counted(replace(DISTILL, syn_steps=n)) for n in (20, 80, 2_000))
    assert many.graph_bytes == 4 * few.graph_bytes > few.kept_bytes + 10 * few.image_bytes
    assert few.kept_bytes < many.kept_bytes < most.kept_bytes < 1.5 * many.kept_bytes
    assert few.image_bytes == most.image_bytes
    two = counted(replace(DISTILL, syn_steps=20, trajectories=2))
    assert two.kept_bytes / few.kept_bytes == two.graph_bytes / few.graph_bytes == 2


def test_students_are_computed_together_on_a_gpu_alone():
    on_cpu, on_gpu = (distil_call(on, trajectories=3, eval_it=0) for on in (CPU, CUDA))
    assert on_gpu.work_bytes - on_cpu.work_bytes == 2 * 10 * on_gpu.work.image_bytes


def test_processes_divide_batches_or_trajectories():
    whole, part = (counted(replace(DISTILL, ipc=7), processes=n) for n in (1, 4))
    assert (part.batch, part.whole_batch, part.students) == (18, 70, 1)
    assert (whole.divides_batches, part.divides_batches) == (False, True)
    assert part.flop == whole.flop // 4
    part = counted(replace(DISTILL, ipc=7, trajectories=8), processes=4)
    assert (part.batch, part.students, part.divides_batches) == (70, 2, False)
    assert part.flop == 2 * whole.flop
    with pytest.raises(UserError, match="--trajectories 8 cannot be divided over 3 processes"):
        counted(replace(DISTILL, trajectories=8), processes=3)
    with pytest.raises(UserError, match="11 processes are more than the 10 images"):
        counted(DISTILL, processes=11)


# What auto stands for.


@pytest.fixture
def no_compiler(monkeypatch):
    error = RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nset TORCH_LOGS")
    monkeypatch.setattr(torch, "compile", Mock(side_effect=error))


def trying(on=CPU):
    """A machine that notes how often compiling is tried, and the notes."""
    tried = []
    return replace(on, check_compiles=lambda: tried.append(1)), tried


@pytest.mark.parametrize("kind", ["outer steps", "training"])
def test_only_a_long_run_is_compiled(capsys, kind):
    on, tried = trying()
    assert not choose_compile("auto", on, 1.0, kind=kind, layers=4)
    assert capsys.readouterr().out == ""  # a table of evaluations is not interrupted
    assert tried == []  # nobody waits for a trial
    assert choose_compile("auto", on, 7200.0, kind=kind, layers=4)
    assert capsys.readouterr().out == f"compile auto: on, about 2.0 h of {kind}, 48 s to compile\n"
    assert tried == [1]
    assert not choose_compile("auto", on, 3600.0, kind=kind, layers=400)
    # an hour of one thread is nothing to 64, or to a GPU
    many = replace(CPU, speed=replace(CPU_THREAD, rate=64 * CPU_THREAD.rate))
    for other in (many, CUDA):
        seconds = other.seconds(3600 * CPU_THREAD.rate, 0, kind)
        assert not choose_compile("auto", other, seconds, kind=kind, layers=8)


@pytest.mark.parametrize("chosen", [True, False])
def test_what_is_asked_for_is_done(capsys, chosen):
    on, tried = trying()
    for asked, seconds in itertools.product(("on" if chosen else "off", chosen), (1.0, 1e30)):
        assert choose_compile(asked, on, seconds, layers=4) is chosen
    assert capsys.readouterr().out == ""
    assert tried == 4 * [1] * chosen


def test_without_a_compiler_on_is_an_error_and_auto_is_off(no_compiler, capsys):
    on = Machine.here(torch.device("cpu"))
    with pytest.raises(UserError) as error:
        choose_compile("on", on, 1.0, layers=4)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--compile on", "No working C++ compiler", "g++", "--compile off"):
        assert part in message
    assert not choose_compile("auto", on, 1e30, layers=4)
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith("compile auto: off, compiling fails here")


@pytest.mark.parametrize("error", [RuntimeError(), AssertionError("")])
def test_a_compiler_that_fails_without_a_word(monkeypatch, error):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=error))
    with pytest.raises(UserError, match=f"--compile on.*{type(error).__name__}"):
        execution.check_compiles(torch.device("cpu"))


@pytest.mark.slow
def test_compiling_is_tried_for_real():
    """Passes where there is a compiler; elsewhere it is the UserError."""
    execution.check_compiles(torch.device("cpu"))


UNROLL = {"compiled": False, "divided": False}
WORK = counted(replace(DISTILL, syn_steps=10))
JUST_ROOM = replace(CPU, free=10 * WORK.graph_bytes + 1)


def test_only_a_small_graph_on_a_cpu_is_kept_whole(capsys):
    def chosen(work=WORK, on=JUST_ROOM, **changes):
        return choose_unroll("auto", work, on, **UNROLL | changes)

    assert chosen() == "autograd"
    assert chosen(compiled=True) == chosen(divided=True) == "adjoint"
    assert chosen(replace(WORK, graph_bytes=WORK.graph_bytes + 1)) == "adjoint"
    assert chosen(on=replace(CUDA, free=JUST_ROOM.free)) == "adjoint"
    whole, *others = capsys.readouterr().out.splitlines()
    assert whole == "unroll auto: autograd, whose graph takes about 0.01 GB"
    assert others == 4 * ["unroll auto: adjoint"]


def test_the_engine_that_is_asked_for_is_taken(capsys):
    divided, no_graph = UNROLL | {"divided": True}, replace(WORK, graph_bytes=None)
    assert choose_unroll("autograd", WORK, replace(CUDA, free=0), **UNROLL) == "autograd"
    assert choose_unroll("adjoint", WORK, CPU, **UNROLL) == "adjoint"
    assert choose_unroll("adjoint", WORK, CPU, **divided) == "adjoint"
    assert choose_unroll("auto", no_graph, CPU, **UNROLL) == "adjoint"
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"--unroll autograd .*--micro_batch.*torchrun.*adjoint"):
        choose_unroll("autograd", WORK, CPU, **divided)
    with pytest.raises(UserError, match="--unroll autograd: this method has no graph"):
        choose_unroll("autograd", no_graph, CPU, **UNROLL)


def planned(options, dataset, on, recorded=None):
    size = size_of(dataset)
    work = counted(options, size.network(options.model))
    return plan_run(options, size, work, on, recorded=recorded or {})


def test_a_short_run_on_a_cpu_stays_simple_and_a_row_is_compiled():
    """The README's run on digits, and CIFAR-10 at IPC 1."""
    on = replace(CPU, free=8 * 2**30)
    quick = replace(DISTILL, syn_steps=10, eval_it=50, epoch_eval_train=100)
    short = planned(quick, "digits", on)
    assert short == RunPlan(False, "autograd", 10, False, 1)
    row = DistillOptions(syn_steps=80, Iteration=6_000)
    assert planned(row, "CIFAR10", on) == RunPlan(True, "adjoint", 10, True, 1)
    # a run that is continued goes on as it began, where the flags leave it to auto
    assert planned(row, "CIFAR10", on, vars(short)) == short
    by_hand = replace(row, compile="on", unroll="adjoint", micro_batch=5)
    assert planned(by_hand, "CIFAR10", on, vars(short)) == RunPlan(True, "adjoint", 5, True, 1)


@pytest.mark.parametrize("on", [CPU, CUDA])
@pytest.mark.parametrize("students", [1, 4])
@pytest.mark.parametrize("free", [2**28, 2**30, 80 * 2**30, 10_000 * 2**30])
def test_micro_batches_bound_the_memory(on, free, students):
    on = replace(on, free=free)
    work = replace(WORK, batch=5_000, students=students, image_bytes=4 * 2**20)
    held = choose_micro_batch(None, work, on) * students * work.image_bytes
    assert held <= min(on.speed.working_set, free // 2)
    assert 2 * (held + students * work.image_bytes) > on.budget  # and is not much smaller


def test_micro_batches_are_no_larger_than_the_batch_and_never_empty():
    work, none = replace(WORK, batch=100), replace(CPU, free=0)
    assert choose_micro_batch(None, replace(work, batch=20), CPU) == 20
    assert [choose_micro_batch(n, work, CPU) for n in (64, 640)] == [64, 100]
    assert choose_micro_batch(None, work, none) == 1
    assert choose_micro_batch(64, work, none) == 64  # by hand


def test_how_many_networks_train_at_once():
    def at_once(asked, on, bytes_each, networks=10):
        cost = NetworkCost(0, layers=1, flop=1, activation_bytes=bytes_each // 2, **SHAPE)
        return choose_at_once(asked, Training(cost, 1, 1), on, networks=networks)

    assert at_once(None, CPU, 2) == 1
    assert at_once(None, CUDA, 2) == 10
    assert at_once(None, CUDA, 2**30) == 3  # of 1 GB each
    assert at_once(None, CUDA, 2**40) == 1
    assert at_once(4, CPU, 2**40) == 4
    assert at_once(40, CUDA, 2) == 10
    assert at_once(None, replace(CUDA, free=3 * 2**30), 2**30) == 1
    assert at_once(None, replace(CUDA, processes=4), 2) == 3
    assert at_once(None, CUDA, 2, networks=0) == 1  # nothing is missing


@pytest.mark.parametrize("every", [0, 1, 7, 10, 50])
@pytest.mark.parametrize("end", [0, 1, 20, 50])
def test_evaluations_that_are_left(every, end):
    """As distill_att.py decides: at the multiples of eval_it, 0 among them, and at the end."""
    options = replace(DISTILL, Iteration=end, eval_it=every)
    points = [i for i in range(end + 1) if every and (i % every == 0 or i == end)]
    for evaluated in range(-1, end + 2):
        assert evaluations_left(options, evaluated) == sum(i > evaluated for i in points)


# What this machine has.


@pytest.mark.parametrize(
    ("limit", "used", "stat", "free"),
    [
        (f"{5 * GB}\n", f"{2 * GB}\n", f"anon {GB}\nfile {GB}\n", 3),
        # pages of files that were read can be let go
        (5 * GB, 3 * GB, f"file {2 * GB}\ninactive_file {GB}\nactive_file {GB}\n", 4),
        # no such limit, or one that says nothing: what the host has
        (None, None, None, 8),
        ("max\n", "0\n", "anon 1\n", 8),
        ("1000\n", None, None, 8),
        (50 * GB, 0, "anon 1\n", 8),
    ],
)
def test_a_container_limits_the_memory(monkeypatch, tmp_path, limit, used, stat, free):
    for name, text in {"max": limit, "current": used, "stat": stat}.items():
        if text is not None:
            (tmp_path / f"memory.{name}").write_text(str(text))
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    there = SimpleNamespace(available=8 * GB)
    monkeypatch.setattr(machines.psutil, "virtual_memory", lambda: there)
    assert free_bytes(torch.device("cpu")) == free * GB


def test_processes_look_at_this_machine_and_agree_on_the_scarcest_memory(monkeypatch, tmp_path):
    here = Machine.here(torch.device("cpu"))
    assert 0 < here.host < 10**15
    assert 10**8 < here.held < 10**12  # torch is loaded
    assert here.held == pytest.approx(held_bytes(), rel=0.1)
    assert here.speed.rate == CPU_THREAD.rate * torch.get_num_threads()
    assert (here.processes, here.processes_here) == (1, 1)
    number, free = here.disk(tmp_path / "not/there/yet")
    assert number == tmp_path.stat().st_dev
    assert free == pytest.approx(disk_of(tmp_path)[1], rel=0.1)
    monkeypatch.setattr(ranks, "world", lambda: 8)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, 5])
    monkeypatch.setattr(ranks, "from_main", lambda value: HELD)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    one_of_eight = Machine.here(torch.device("cpu"))
    assert (one_of_eight.free, one_of_eight.host, one_of_eight.held) == (5, 5, HELD)
    assert (one_of_eight.processes, one_of_eight.processes_here) == (8, 4)


# Memory and disk.

DIGITS, CIFAR = size_of("digits"), size_of("CIFAR10")
IPC1 = {"model": "ConvNetD3", "syn_steps": 40, "eval_it": 0}
IPC10 = {"model": "ConvNetD3", "ipc": 10, "syn_steps": 4, "eval_it": 100}


@pytest.mark.parametrize(
    ("size", "demand", "options", "peak"),
    [
        (DIGITS, experts_demand, {"train_epochs": 50, "num_experts": 3, "missing": range(3)}, 0.94),
        (DIGITS, distil_demand, {"Iteration": 6, "eval_it": 100, "how": GRAPH}, 1.01),
        (DIGITS, eval_demand, {"random": True, "full": True}, 0.97),
        (CIFAR, experts_demand, {"model": "ConvNetD3", "zca": True, "compiled": True}, 2.77),
        (CIFAR, distil_demand, IPC1, 1.82),
        (CIFAR, distil_demand, IPC1 | {"how": GRAPH}, 3.34),
        (CIFAR, distil_demand, IPC1 | {"how": COMPILED}, 1.90),
        (CIFAR, distil_demand, IPC1 | {"zca": True}, 2.78),
        (CIFAR, distil_demand, IPC1 | {"precision": "fp64"}, 2.02),
        (CIFAR, distil_demand, IPC10 | {"how": replace(PLAN, micro_batch=25)}, 1.96),
        (CIFAR, distil_demand, IPC10 | {"how": GRAPH}, 2.88),
        (CIFAR, eval_demand, {"model": ["ConvNetD3"], "random": True}, 2.31),
    ],
)
def test_estimates_are_near_measured_peaks(tmp_path, size, demand, options, peak):
    """In GB, from docs/performance.md, of processes that held 0.7 or 0.95 GB before the work."""
    on = replace(CPU, held=700 * 10**6 if size is DIGITS else 950 * 10**6)
    need = demand(tmp_path, on, size=size, **options).of()
    assert 0.8 < need.host / 1e9 / peak < 1.6


@pytest.mark.parametrize(
    ("numbers", "per_file", "most"),
    [
        (range(10), 10, 10 + 10),
        (range(15), 10, 15 + 5),
        (range(30), 10, 30 + 10),
        (range(30), 1, 30 + 1),
        (range(7, 12), 10, 3 + 10),
    ],
)
def test_the_experts_of_a_file_are_there_twice_while_it_is_written(numbers, per_file, most):
    assert experts_bytes(1_000, numbers, per_file=per_file) == 1_000 * most


def test_what_experts_need(tmp_path):
    expert = expert_bytes(SIZE.network("ConvNetD2"), epochs=4)
    need, on_gpu = (experts_demand(tmp_path, on, num_experts=20).of() for on in (CPU, CUDA))
    assert (need.device, need.held) == (0, HELD)
    # missing are 0 ... 19; the last ten are in a file and beside it, and one is kept as it trains
    written = Disk(tmp_path / "b", (20 + 10 + 1) * expert, "another --buffer_path")
    assert need.disk == (written, Disk(tmp_path, 0))
    assert on_gpu.device > CONTEXT_BYTES + SIZE.float_bytes(800)
    assert on_gpu.host == HELD + STARTED_BYTES + expert
    for on in (CPU, CUDA):
        assert experts_demand(tmp_path, on, compiled=True).of().host > HELD + COMPILER_BYTES
    fewer = experts_demand(tmp_path, num_experts=20, missing=range(10, 20)).of()
    assert 0 < fewer.disk[0].bytes < need.disk[0].bytes


def test_caches_that_are_missing_are_counted(tmp_path):
    matrix, pixels = 4 * 192**2, 192 * 800
    for made, left in ((None, pixels + matrix), ("zca", pixels), ("train", 192 * 200)):
        if made:
            (tmp_path / f"x_8_{made}.pt").touch()
        found = source(tmp_path, pictures=True)
        assert distil_demand(tmp_path, found=found, zca=True).of().disk[1] == Disk(tmp_path, left)
        # an evaluation of a set without its whitening fits it too
        whitened = eval_demand(tmp_path, of=distilled(zca=True)).of().disk[1].bytes
        assert whitened == matrix * (made is None)


def test_images_held_out_are_decoded_with_the_others(tmp_path):
    divided = replace(SIZE, train=540, val=60)
    for size in (SIZE, divided):
        found = source(tmp_path, size, pictures=True)
        assert DataSize.of(found) == size
        assert distil_demand(tmp_path, found=found).of().disk[1].bytes == 800 * SIZE.values


def test_what_a_run_writes(finished):
    """The finished run of the other tests, by its own configuration."""
    config = yaml.safe_load((finished / "config.yaml").read_text())
    known = {name: config[name] for name in DistillOptions.__dataclass_fields__ if name in config}
    written, _ = run_bytes(DistillOptions(**known), DIGITS)
    size = sum(path.stat().st_size for path in finished.iterdir())
    assert 0.7 < written / size < 1.4


def test_what_is_left_to_write():
    """Sets, log and checkpoint; the last and the best sets have their whitening."""
    options, matrix = replace(DISTILL, ipc=2, zca=True), SIZE.matrix_bytes

    def left(options=options, **run):
        return run_bytes(options, SIZE, **run)[0]

    assert left() > left(iteration=0) > left(iteration=50) > left(iteration=100) > 4 * matrix
    assert left() - left(replace(options, zca=False)) == 4 * matrix
    assert left() > left(replace(options, save_it=50)) > left(replace(options, save_it=0))
    assert left(replace(options, save_it=0)) - left(replace(options, eval_it=0)) > 2 * matrix
    there = ("last", "ema_last", "best", "ema_best")
    assert left(iteration=100, there=there) == 0


def test_what_a_distillation_needs(tmp_path):
    need, on_gpu = (distil_demand(tmp_path, on).of() for on in (CPU, CUDA))
    assert need.host - STARTED_BYTES - HELD == on_gpu.device - CONTEXT_BYTES > 0
    wide = distil_demand(tmp_path, CUDA, precision="fp64").of()
    assert wide.device - CONTEXT_BYTES == 2 * (on_gpu.device - CONTEXT_BYTES)
    loaded = 100 * expert_bytes(SIZE.network("ConvNetD2"), epochs=50)
    assert distil_demand(tmp_path, load_all=True).of().host == need.host + loaded


def test_another_method_needs_no_line_of_the_planner(tmp_path, monkeypatch):
    """One that has no experts, and keeps the real training images on the device."""
    work = Work(10**9, 20, 266, 266, 1, 10**6, 10**5, compiled_layers=4, keeps_train=True)
    how = plan_run(DISTILL, SIZE, work, CUDA, recorded={})
    assert how.micro_batch == 266
    spec = SimpleNamespace(count_work=lambda *given, classes: work)
    monkeypatch.setitem(METHODS, "other", spec)
    call = DistillCall(replace(DISTILL, method="other", eval_it=0), SIZE, how, CUDA)
    demand = call.demand(source(tmp_path), None, RunDir(tmp_path / "r"))
    data = CONTEXT_BYTES + SIZE.float_bytes(600 + 200 + IMAGE_COPIES * 10)
    assert demand.of().device == data + 10**6 + 266 * 10**5
    assert not demand.gentler["max_experts"]
    message = short(demand, replace(CUDA, free=data + 10**6 + 70 * 10**5))
    assert message.endswith("are free: pass --micro_batch 66, or pass --force")


def test_a_run_that_is_continued_needs_less_disk_and_as_many_experts(tmp_path):
    begun, later = (distil_demand(tmp_path, load_all=True, iteration=n) for n in (-1, 60))
    disk = [demand.of().disk[0].bytes for demand in (begun, later)]
    assert disk[0] > disk[1]
    # refused with fewer experts, so that is no advice
    assert begun.gentler["max_experts"]
    assert not later.gentler["max_experts"]
    (tmp_path / "r").mkdir()
    (tmp_path / "r/distilled_best.pt").touch()
    assert distil_demand(tmp_path, iteration=60).of().disk[0].bytes < disk[1]


def test_what_an_evaluation_needs(tmp_path):
    def host(**options):
        return eval_demand(tmp_path, **options).of().host

    assert host(random=True) - host() == SIZE.float_bytes(600 + 2 * 5 * 10)
    assert host(full=True) - host() > SIZE.float_bytes(600)
    assert host(model=["AlexNet"]) > host()


def test_networks_that_regress_are_counted_in_batches_of_their_own(tmp_path):
    def host(of):
        size, model = replace(SIZE, test=5), "ConvNetKIPW512"  # testing takes less than training
        return eval_demand(tmp_path, of=of, size=size, model=[model], batch_train=1).of().host

    regressed = distilled()
    regressed.config |= {"kernel": "fc", "kernel_depth": 1, "reg": 1e-6}
    image = SIZE.network("ConvNetKIPW512").activation_bytes
    assert host(regressed) - host(distilled()) > 15 * image  # twice ten instead of one


def test_the_compiler_is_counted_where_some_set_will_be_compiled_and_not_tried(tmp_path):
    on, tried = trying()
    auto = {"compile": "auto", "full": True, "epoch_eval_train": 1}
    need = [eval_demand(tmp_path, on, **auto, epoch_full_train=n).of() for n in (1, 10**6)]
    assert need[1].host > COMPILER_BYTES > need[0].host
    assert tried == []


def test_choosing_by_experts_takes_their_features_of_all_training_images(tmp_path):
    chooses = partial(eval_demand, tmp_path, expert_features=SimpleNamespace(width=10**6))
    features, chosen = 4 * 10**6 * 600, chooses(herding=True).of()
    assert features < chosen.host - eval_demand(tmp_path, random=True).of().host
    assert chooses(random=True, herding=True, k_center=True).of().host == chosen.host
    assert chooses(CUDA, forgetting=True, eval_at_once=1).of().device > features


# What is said where room is short.


def test_where_there_is_room_one_line_says_so(tmp_path, capsys):
    on = with_disk(80 * GB, CUDA)
    demand = distil_demand(tmp_path, on)
    check_room(demand, on, force=False)
    need = demand.of()
    assert capsys.readouterr().out == (
        f"needs about {readable(need.device)} on the GPU (80 GB free), "
        f"{readable(need.host)} of memory (1.0 MB held by now, 80 GB free), "
        f"{readable(need.disk[0].bytes)} of disk in {tmp_path / 'r'} (80 GB free)\n"
    )
    check_room(distil_demand(tmp_path), CPU, force=False)
    assert "GPU" not in capsys.readouterr().out


def flags_in(message):
    """The changes that a message advises, by flag."""
    advice = message.rpartition(": ")[2].removesuffix(", or pass --force").split()
    pairs = [pair for pair in itertools.pairwise(advice) if pair[0].startswith("--")]
    return {
        flag[2:]: int(value) if value.isdecimal() else {"false": False}.get(value, value)
        for flag, value in pairs
    }


@pytest.mark.parametrize(
    ("on", "options"),
    [
        (CUDA, {"how": LARGE}),
        (CUDA, {"how": LARGE, "ipc": 100, "trajectories": 4}),
        (CPU, {"how": LARGE}),
        (CPU, {"load_all": True}),
        (CPU, {"how": LARGE, "load_all": True}),
        (CPU, {"how": GRAPH, "syn_steps": 80}),
        (CPU, {"how": LARGE, "eval_it": 0}),
        (CUDA, {"how": COMPILED, "load_all": True}),
    ],
)
def test_advice_is_true_and_no_more_than_is_needed(tmp_path, on, options):
    demand = distil_demand(tmp_path, on, **options)
    seen = set()
    for where in ("free", "host") if on.is_gpu else ("host",):

        def amount(flags, where=where):
            need = demand.of(**flags)
            return need.device if where == "free" else need.more

        least, most = amount(demand.last_values), amount({})
        for tenths in range(10 if most > least else 0):
            free = least + (most - least) * tenths // 10
            chosen = flags_in(short(demand, replace(on, **{where: free})))
            seen |= chosen.keys()
            assert amount(chosen) <= free
            for flag in chosen:
                assert amount({f: v for f, v in chosen.items() if f != flag}) > free
    assert seen


def test_memory_that_is_short(tmp_path):
    demand = distil_demand(tmp_path, CUDA, how=LARGE)
    free = demand.of(micro_batch=2500, eval_at_once=16).device
    message = short(demand, replace(CUDA, free=free))
    assert message.startswith("too little memory on the GPU: about ")
    assert "GB are needed" in message
    assert "--micro_batch" in message
    demand = distil_demand(tmp_path, load_all=True)
    message = short(demand, replace(CPU, host=demand.of(load_all=False).more))
    assert message.startswith("too little memory: about ")
    assert message.endswith(" are free: pass --load_all false, or pass --force")


@pytest.mark.parametrize(("on", "what"), [(CUDA, "a GPU"), (CPU, "a machine")])
def test_where_no_flag_helps_none_is_named(tmp_path, on, what):
    little = replace(on, free=0, host=10**6)
    small = distil_demand(tmp_path, on, how=replace(PLAN, micro_batch=1))
    for demand in (experts_demand(tmp_path, on), small):
        assert f"are free: use {what} with more memory" in short(demand, little)
    message = short(distil_demand(tmp_path, on, how=LARGE, eval_it=0), little)
    assert f"even --micro_batch 1 takes {'1.0 GB' if on is CUDA else ''}" in message
    assert f"; use {what} with more memory" in message


def test_disk_that_is_short(tmp_path):
    demand = experts_demand(tmp_path, num_experts=30)
    expert = demand.of(num_experts=1).disk[0].bytes / 3
    message = short(demand, with_disk(25.5 * expert))
    assert message == (
        f"too little disk: about {readable(41 * expert)} are needed in {tmp_path / 'b'}, "
        f"{readable(25.5 * expert)} are free: pass another --buffer_path or --num_experts 17, "
        "or pass --force"
    )  # 10 + 7 experts, seven of them twice, one as it trains
    demand = distil_demand(tmp_path)
    rarer = with_disk(demand.of(save_it=20).disk[0].bytes)
    assert short(demand, rarer).endswith(
        "pass another --save_path or --save_it 20, or pass --force"
    )
    assert short(demand, with_disk(0)).endswith("pass another --save_path, or pass --force")
    assert "pass a copy of the set on another disk" in short(eval_demand(tmp_path), with_disk(0))


def test_to_train_no_expert_is_no_advice(tmp_path):
    demand = experts_demand(tmp_path, missing=range(50, 100))
    assert demand.gentler["num_experts"][-1] == 51
    message = short(demand, with_disk(0))
    assert message.endswith("are free: pass another --buffer_path, or pass --force")


def test_folders_on_one_disk_share_it_and_caches_can_be_done_without(tmp_path):
    run, cache = tmp_path / "r", tmp_path / "cache"
    need = Need(0, 0, 0, (Disk(run, 60, "another --save_path"), Disk(cache, 50)))
    demand = Demand(lambda: need, {})
    assert f"in {run} and {cache}" in short(demand, with_disk(100))

    def two(free):
        return replace(CPU, disk=lambda folder: (folder.name, free))

    check_room(demand, two(100), force=False)
    assert "cache" not in short(demand, two(40))


def test_by_force_it_is_only_a_warning(tmp_path, caplog):
    none = replace(with_disk(0, CUDA), free=0, host=0)
    check_room(distil_demand(tmp_path, CUDA), none, force=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("going on by --force: too little memory on the GPU")
    for part in ("too little memory: ", "too little disk: "):
        assert part in record.getMessage()


def test_processes_of_one_machine_share_its_memory(tmp_path):
    def several(processes, here, **options):
        on = replace(CPU, processes=processes, processes_here=here)
        return distil_demand(tmp_path, on, **options)

    two = several(8, 4, ipc=8)
    assert two.of().held == 4 * HELD
    assert two.of().host > 3 * distil_demand(tmp_path).of().host
    assert two.gentler["nproc_per_node"] == []  # two machines with four each
    assert several(8, 8, ipc=8).gentler["nproc_per_node"] == [4, 2, 1]
    assert several(6, 6, trajectories=6).gentler["nproc_per_node"] == [3, 1]
    odd = several(8, 8, ipc=8, trajectories=24)
    assert odd.of(nproc_per_node=4).host < odd.of().host
    one = replace(CPU, processes=8, processes_here=8)
    assert experts_demand(tmp_path, one).gentler["num_experts"][-1] == 8


def test_what_the_main_process_lacks_stops_all_of_them(tmp_path, monkeypatch):
    demand = distil_demand(tmp_path)
    monkeypatch.setattr(ranks, "from_main", lambda value: "short there")
    with pytest.raises(UserError, match="short there, or pass --force"):
        check_room(demand, CPU, force=False)
    monkeypatch.setattr(ranks, "from_main", lambda value: "")
    check_room(demand, with_disk(0), force=False)  # the disk is the main process's


# Time.


def test_the_time_that_is_left():
    steps = time_left([30, 20, 4.8, 4.7, 4.9], 1000)
    assert steps == "about 4.8 s an iteration, 1.3 h left"
    known = time_left([4.8], 1000, evaluations=12, evaluation_seconds=40)
    assert known == ("about 4.8 s an iteration, 1.5 h left with 12 evaluations of about 40 s")
    assert time_left([4.8], 1000, evaluations=1) == f"{steps} and 1 evaluation"
    assert time_left([90, 60], 1000, unit="network") == "about 1.2 min a network, 20.8 h left"


def test_durations_and_sizes_are_for_people():
    seconds = (0.0123, 4.84, 59, 90, 7200, 172_800 + 43_200)
    assert [*map(duration, seconds)] == ["0.012 s", "4.8 s", "59 s", "1.5 min", "2.0 h", "2.5 days"]
    counts = (0, 12_345_678, 3_400_000_000, 78_400_000_000)
    assert [*map(readable, counts)] == ["1.0 MB", "12 MB", "3.4 GB", "78 GB"]


def test_small_steps_take_as_long_as_launching_them():
    assert CUDA.seconds(0, 100, "training") == 100 * GPU.step_seconds
    assert CPU.seconds(0, 100, "training") == 0
    assert CUDA.seconds(2 * GPU.rate, 0, "training") == 2
    training = Training(COST, images=10, batch=10, epochs=100)

    def seconds(on, **how):
        return on.training_seconds(training, networks=10, **how)

    alone, together = (seconds(CUDA, at_once=n) for n in (1, 5))
    assert alone / together == pytest.approx(5, rel=0.01)  # two rounds instead of ten
    assert seconds(replace(CUDA, processes=2), at_once=5) == pytest.approx(together / 2)
    assert seconds(CPU, at_once=1) == 10 * training.flop / CPU.speed.rate
    assert seconds(CPU, at_once=1, compiled=True) < seconds(CPU, at_once=1)


def test_times_are_expected_before_the_work():
    options = BufferOptions(model="ConvNetD2", train_epochs=4)
    plan = TrainingPlan(SIZE.experts_training(options), compiled=True, at_once=10)
    time = ExpertsCall(options, SIZE, range(95), plan, CUDA).time
    assert time.left == 10 * 4
    assert str(time).startswith("about ")
    assert " an epoch, " in str(time)
    time = distil_call(iteration=50).time
    assert time.total == 50 * time.seconds + 11 * time.evaluation_seconds
    assert "with 11 evaluations of about" in str(time)
    assert "with 5 evaluations of about" in str(distil_call(iteration=50, evaluated=50).time)


def test_the_queue_and_the_script_estimate_the_same(experts, tmp_path, monkeypatch, capsys):
    """A dry run on an A100 says what scripts/plan says of one."""
    monkeypatch.setattr(Machine, "here", lambda device: replace(A100, disk=disk_of))
    flags = "--dataset digits --model ConvNetD1 --ipc 2 --max_start_epoch 1 --expert_epochs 1"
    flags = [*flags.split(), "--run_name", "x"]
    where = ["--buffer_path", str(experts), "--save_path", str(tmp_path), "--dry_run"]
    assert distill_att.main([*flags, *where]) == 0
    said = capsys.readouterr().out
    options = distill_att.parse(flags).options
    time, memory = distillation_estimate(options, DIGITS)
    assert f"estimated: {time}\n" in said
    assert f"needs about {readable(memory)} on the GPU (80 GB free)" in said
    whole = row_estimate(options, EvalOptions(), res=8)
    assert time.total / 3600 < whole.hours < 1.5 * time.total / 3600
    assert whole.memory == memory / 1e9


def test_what_is_planned_for_an_a100_is_silent_and_not_tried(no_compiler, capsys):
    row = DistillOptions(syn_steps=80, Iteration=6_000)
    assert row_estimate(row, EvalOptions(), res=32).hours > 0.1
    long = Training(SIZE.network("ConvNetD2"), 10**9, 256)
    assert plan_training(long, A100, networks=1, compile="auto", at_once=None).compiled
    assert capsys.readouterr().out == ""


# Experts that are still to be made.


def lines_of(capsys, *argv):
    capsys.readouterr()
    assert distill_att.main(["--dataset", "digits", "--dry_run", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_says_what_experts_it_needs_before_there_are_any(tmp_path, capsys):
    """Their command, as the error without --dry_run has it, with time and disk of its own."""
    argv = ["--buffer_path", tmp_path / "b", "--save_path", tmp_path / "r", "--model", "ConvNetD1"]
    said = lines_of(capsys, *argv, "--expert_epochs", 1, "--max_start_epoch", 1)
    folder, command = tmp_path / "b/digits/ConvNetD1", "python buffer.py --dataset digits "
    command += f"--model ConvNetD1 --buffer_path {tmp_path}/b --data_path data"
    at = said.index(f"no experts are complete in {folder}; make them with: {command}")
    assert said[at + 1] == "10 experts of 4 epochs (1 would do: --train_epochs 1)"
    assert re.match(r"estimated: about .* an epoch, .* left", said[at + 2])
    assert re.search(rf"MB of disk in {folder}", said[at + 3])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"no expert buffers in .*: {re.escape(command)}$"):
        distill_att.main(["--dataset", "digits", *map(str, argv)])


def test_experts_are_asked_for_as_long_as_the_lengths_need(tmp_path, capsys):
    argv = ["--buffer_path", tmp_path / "b", "--save_path", tmp_path / "r", "--expert_epochs", 4]
    said = lines_of(capsys, *argv, "--max_start_epoch", 6)
    assert any(line.endswith("--data_path data --train_epochs 9") for line in said)
    assert "10 experts of 9 epochs" in said
    (tmp_path / "b/digits/ConvNetD2").mkdir(parents=True)
    (tmp_path / "b/digits/ConvNetD2/experts.json").write_text('{"train_epochs": 12}')
    said = lines_of(capsys, *argv, "--max_start_epoch", 6)
    assert "10 experts of 12 epochs (9 would do: --train_epochs 9)" in said  # what was begun


def test_experts_of_one_epoch_serve_one_start(tmp_path):
    where = ["--buffer_path", str(tmp_path), "--dataset", "digits", "--model", "ConvNetD1"]
    assert buffer.main([*where, "--num_experts", "1", "--train_epochs", "1"]) == 0
    argv = [*where, "--save_path", str(tmp_path / "r"), "--expert_epochs", "1", "--syn_steps", "2"]
    argv += "--eval_it 0 --Iteration 1".split()
    assert distill_att.main([*argv, "--max_start_epoch", "1"]) == 0
    with pytest.raises(UserError, match=r"start epoch 1 \+ .* = 2 .* 1 epochs .*--train_epochs 2"):
        distill_att.main([*argv, "--max_start_epoch", "2"])
