"""What calls will need, counted by hand and measured, and what is said where that is not there."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from utils.compute.cost import (
    ADJOINT_COPIES,
    GRAPH_VECTORS,
    TRAINING_COPIES,
    TRAINING_VECTORS,
    NetworkCost,
)
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.progress import duration, time_left
from utils.data.distilled import SyntheticSet
from utils.data.normalisation import CHUNK, Normalisation
from utils.data.source import Source
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan import estimate, room
from utils.plan.estimate import (
    distillation_demand,
    evaluation_demand,
    expected_distillation_time,
    expected_experts_time,
    experts_demand,
)
from utils.plan.footprint import (
    COMPILER_BYTES,
    CONTEXT_BYTES,
    FILE_BYTES,
    IMAGE_COPIES,
    PICTURE_COPIES,
    STARTED_BYTES,
    STEP_RECORD_BYTES,
    SWEEP_VECTORS,
    ZCA_MATRICES,
    DataSize,
    cache_bytes,
    cohort_bytes,
    experts_bytes,
    matching_bytes,
    picture_bytes,
    reading_bytes,
    run_bytes,
)
from utils.plan.room import Demand, Disk, Need, check_room, readable
from utils.plan.run_plan import RunPlan, Workload, evaluations_left
from utils.run.directory import RunDir

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB, HELD = 10**9, 7_000
COST = NetworkCost(parameters=1_000, layers=4, flop=10_000, activation_bytes=50_000)
SIZE = DataSize(3, 10, 8, train=600, test=200)
PLAN = RunPlan(
    compiled=False, unroll="adjoint", micro_batch=10, eval_compiled=False, eval_at_once=1
)
DISTILL = DistillOptions(dataset="digits", model="ConvNetD2", Iteration=100, eval_it=10)


def source(folder, *, train=600, test=200, val=0, side=8, pictures=False):
    """A data set of 10 classes with 3 channels, its pixels in memory or decoded from pictures."""
    splits = {"train": train, "test": test} | ({"val": val} if val else {})
    files = {split: folder / f"x_8_{split}.pt" for split in ("train", "test")}
    return Source(
        class_names=tuple("0123456789"),
        channels=3,
        image_size=side,
        labels={split: torch.zeros(count, dtype=torch.int64) for split, count in splits.items()},
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


@pytest.fixture
def has(monkeypatch):
    """Sets what is free; the process holds HELD bytes."""
    monkeypatch.setattr(estimate, "held_bytes", lambda: HELD)
    monkeypatch.setattr(room, "disk_of", lambda folder: 0)

    def set_free(*, gpu=80 * GB, host=80 * GB, disk=80 * GB):
        free = {"cuda": gpu, "cpu": host}
        monkeypatch.setattr(room, "free_bytes", lambda device: free[device.type])
        monkeypatch.setattr(room, "free_disk_bytes", lambda folder: disk)

    set_free()
    return set_free


def experts(tmp_path, device=CPU, *, missing=range(100), at_once=1, compiled=False, **options):
    return experts_demand(
        BufferOptions(model="ConvNetD2", train_epochs=4, **options),
        source(tmp_path),
        device,
        folder=tmp_path / "b",
        missing=list(missing),
        at_once=at_once,
        compiled=compiled,
    )


def distillation(tmp_path, device=CPU, *, how=PLAN, iteration=-1, found=None, **options):
    return distillation_demand(
        replace(DISTILL, **options),
        found or source(tmp_path),
        how,
        device,
        experts=Experts(),
        run=RunDir(tmp_path / "r"),
        iteration=iteration,
    )


def short(demand, device=CPU):
    """The one line that refuses the call."""
    with pytest.raises(UserError) as error:
        check_room(demand, device, force=False)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(", or pass --force")
    return message


def test_training_takes_the_batch_and_testing_the_test_images():
    cost = replace(COST, activation_bytes=1_000)
    vectors = TRAINING_VECTORS * 4 * 1_000
    assert cohort_bytes(cost, SIZE, batch=256, at_once=3) == 3 * (2 * 256_000 + vectors)
    assert cohort_bytes(cost, SIZE, batch=1, at_once=3) == 3 * vectors + 200 * 500
    larger = replace(SIZE, image_size=64, test=10_000)
    assert cohort_bytes(cost, larger, batch=1, at_once=1) == vectors + 128 * 500


def workload(**options):
    of = Workload.of(replace(DISTILL, **options), channels=3, num_classes=10, image_size=8)
    return replace(of, cost=COST)


@pytest.mark.parametrize(("syn_steps", "kept"), [(10, 10), (80, 80), (81, 40 + 2), (200, 66 + 3)])
def test_a_sweep_keeps_a_bounded_number_of_steps(syn_steps, kept):
    work = workload(trajectories=2)
    own = 2 * 4_000 * (kept + SWEEP_VECTORS)
    piece = ADJOINT_COPIES * 10 * 50_000
    assert matching_bytes(syn_steps, work, PLAN, vectorised=False) == own + piece
    assert matching_bytes(syn_steps, work, PLAN, vectorised=True) == own + 2 * piece


def test_a_full_graph_keeps_every_step():
    how = replace(PLAN, unroll="autograd")
    step = 2 * 10 * 50_000 + GRAPH_VECTORS * 4_000
    work = workload(trajectories=3)
    assert matching_bytes(20, work, how, vectorised=False) == 3 * 20 * step


def test_reading_takes_the_floats_and_a_chunk(tmp_path):
    both = ("train", "test")
    how = {"kept": both, "zca": False, "fits": False, "wide": 1}
    image = 4 * 3 * 8 * 8
    seen, pixels, chunk = 800 * image, 800 * image // 4, 3 * 600 * image
    assert reading_bytes(source(tmp_path), both, **how) == seen + chunk
    assert reading_bytes(source(tmp_path, pictures=True), both, **how) == pixels + seen + chunk
    many = source(tmp_path, train=50_000)
    assert reading_bytes(many, both, **how) == (50_200 + 3 * CHUNK) * image
    assert reading_bytes(many, both, **how | {"wide": 2}) == 3 * 50_200 * image  # float64 beside


def test_whitening_takes_its_matrix_and_fitting_it_much_more(tmp_path):
    both, image = ("train", "test"), 4 * 192
    found, matrix = source(tmp_path, train=50_000), 4 * 192**2
    how = {"kept": ("test",), "zca": True, "wide": 1}
    fitting = 2 * 50_000 * image + ZCA_MATRICES * matrix
    assert reading_bytes(found, both, fits=True, **how) == fitting
    assert reading_bytes(found, ("test",), fits=False, **how) == matrix + (200 + 600) * image


def test_sheets_of_small_images_are_enlarged():
    assert picture_bytes(SIZE, ipc=5) == PICTURE_COPIES * 8**2 * 50 * 4 * 192


@pytest.mark.parametrize(
    ("numbers", "per_file", "most"),
    [
        (range(10), 10, 10 + 9),
        (range(15), 10, 10 + 9),
        (range(30), 10, 30 + 9),
        (range(30), 1, 30),
        (range(7, 12), 10, 3 + 9),
        ([], 10, 0),
    ],
)
def test_experts_before_the_last_of_a_file_are_there_twice(numbers, per_file, most):
    assert experts_bytes(1_000, numbers, per_file=per_file) == 1_000 * most


def test_what_experts_need(tmp_path, has):
    """ConvNetD2 on 3x8x8: 3x3 kernels of 128 channels, norms, and 4 x 128 features."""
    expert = 5 * 4 * (128 * 28 + 128 * (128 * 9 + 1) + 4 * 128 + 10 * (4 * 128 + 1))
    need = experts(tmp_path, num_experts=20).of({})
    assert (need.device, need.held) == (0, HELD)
    # missing are 0 ... 19; the 20th is saved beside the nine before it, and kept as it trains
    assert [disk.bytes for disk in need.disk] == [(20 + 9 + 1) * expert, 0]
    assert need.disk[0].folder == tmp_path / "b"
    images = 800 * 4 * 192
    outputs = sum(128 * (3 * side**2 + (side // 2) ** 2) for side in (8, 4)) + 10
    training = TRAINING_COPIES * 256 * 4 * outputs + TRAINING_VECTORS * expert // 5
    assert need.host == HELD + STARTED_BYTES + images + expert + training
    on_gpu = experts(tmp_path, CUDA, num_experts=20).of({})
    assert on_gpu.device == CONTEXT_BYTES + images + training
    assert on_gpu.host == HELD + STARTED_BYTES + expert + max(9 * expert, 0)


def test_only_missing_experts_need_room(tmp_path, has):
    disk = [
        experts(tmp_path, missing=range(first, 100)).of({}).disk[0].bytes for first in (0, 50, 90)
    ]
    assert disk[0] > disk[1] > disk[2] > 0
    need = experts(tmp_path, missing=[]).of({})
    assert need == Need(device=0, host=HELD, held=HELD, disk=())


def test_compiling_takes_memory_of_the_host(tmp_path, has):
    for device in (CPU, CUDA):
        need = experts(tmp_path, device, compiled=True).of({})
        assert need.host >= HELD + STARTED_BYTES + COMPILER_BYTES
        assert need.host > experts(tmp_path, device).of({}).host


def test_caches_that_are_missing_are_counted(tmp_path, has):
    found = source(tmp_path, pictures=True)
    matrix, pixels = 4 * 192**2, 192 * 800
    caches = [
        Disk(tmp_path, pixels + matrix),
        Disk(tmp_path, pixels),
        Disk(tmp_path, 192 * 200),
    ]
    for made, cache in zip([None, "x_8_zca.pt", "x_8_train.pt"], caches, strict=True):
        if made:
            (tmp_path / made).touch()
        need = distillation(tmp_path, found=found, zca=True).of({})
        assert need.disk[1] == cache


def test_what_a_run_writes():
    options = replace(DISTILL, ipc=2, zca=True)
    image, matrix = 4 * 192, 4 * 192**2
    one = 20 * (image + 8 + 192) + 2 * FILE_BYTES
    checkpoint, log = 3 * 20 * image + FILE_BYTES, 100 * STEP_RECORD_BYTES
    written, replaced = run_bytes(options, SIZE)
    assert written == 11 * one + 4 * (one + matrix) + checkpoint + log
    assert replaced == one + matrix
    # a run that is continued after 50 steps, with all but the last sets there
    there = {"best", "ema_best"}
    written, replaced = run_bytes(options, SIZE, iteration=50, there=there)
    assert written == 5 * one + 2 * (one + matrix) + log // 2
    assert replaced == one + matrix
    written, _ = run_bytes(replace(options, eval_it=0), SIZE)
    assert written == one + 2 * (one + matrix) + checkpoint + log  # the first and the last ones
    written, _ = run_bytes(options, SIZE, iteration=100, there={"last", "ema_last", *there})
    assert written == 0


def test_what_a_run_has_written(finished):
    """The finished run of the other tests, by its own configuration."""
    config = yaml.safe_load((finished / "config.yaml").read_text())
    known = {field: config[field] for field in DistillOptions.__dataclass_fields__}
    written, _ = run_bytes(DistillOptions(**known), DataSize(1, 10, 8, train=1437, test=360))
    size = sum(path.stat().st_size for path in finished.iterdir())
    assert 0.7 < written / size < 1.4


def test_what_a_distillation_needs(tmp_path, has):
    cost = workload().evaluation_costs[0]
    images, test = 10 * 4 * 192, 200 * 4 * 192
    work = IMAGE_COPIES * images + max(
        cohort_bytes(cost, SIZE, batch=10, at_once=1),
        matching_bytes(50, replace(workload(), cost=cost), PLAN, vectorised=False),
    )
    need = distillation(tmp_path).of({})
    assert need.host == HELD + STARTED_BYTES + test + work
    assert distillation(tmp_path, CUDA).of({}).device == CONTEXT_BYTES + test + work
    wide = distillation(tmp_path, CUDA, precision="fp64").of({})
    assert wide.device == CONTEXT_BYTES + 2 * (test + work)
    loaded = 100 * 51 * 4 * cost.parameters
    assert distillation(tmp_path, load_all=True).of({}).host == need.host + loaded


def test_a_run_that_is_continued_needs_less_disk(tmp_path, has):
    disk = [
        distillation(tmp_path, iteration=iteration).of({}).disk[0].bytes
        for iteration in (-1, 0, 60, 100)
    ]
    assert sorted(disk, reverse=True) == disk
    (tmp_path / "r").mkdir()
    (tmp_path / "r/distilled_best.pt").touch()
    assert distillation(tmp_path, iteration=60).of({}).disk[0].bytes < disk[2]


def distilled(**values):
    normalisation = Normalisation((0.0,) * 3, (1.0,) * 3, **values)
    return SyntheticSet(
        images=torch.zeros(10, 3, 8, 8),
        labels=torch.arange(10),
        syn_lr=0.01,
        dataset="x",
        subset=None,
        model="ConvNetD2",
        ipc=1,
        class_names=tuple("0123456789"),
        normalisation=normalisation,
        iteration=0,
        set="raw",
        config={"batch_train": 256},
    )


def evaluation(tmp_path, device=CPU, *, of=None, models=("ConvNetD2",), observer=None, **options):
    return evaluation_demand(
        EvalOptions(compile="off", **options),
        source(tmp_path),
        of or distilled(),
        models,
        device,
        folder=tmp_path,
        observer=observer,
    )


def test_what_an_evaluation_needs(tmp_path, has):
    cost, image = SIZE.network("ConvNetD2"), 4 * 192
    held = HELD + STARTED_BYTES
    own = cohort_bytes(cost, SIZE, batch=10, at_once=1)
    assert evaluation(tmp_path).of({}).host == held + 210 * image + own
    drawn = evaluation(tmp_path, random=True).of({})
    assert drawn.host == held + (210 + 600 + 2 * 5 * 10) * image + own
    whole = cohort_bytes(cost, SIZE, batch=256, at_once=1)
    assert evaluation(tmp_path, full=True).of({}).host == held + 810 * image + whole
    larger = evaluation(tmp_path, models=("ConvNetD2", "AlexNet")).of({})
    assert larger.host > held + 210 * image + own
    assert 0 < larger.disk[0].bytes < 10**5


def test_choosing_by_experts_takes_their_features_of_all_training_images(tmp_path, has):
    alone, features = evaluation(tmp_path, random=True).of({}), 10**6
    observer = SimpleNamespace(width=features)
    chosen = evaluation(tmp_path, herding=True, observer=observer).of({})
    own = cohort_bytes(SIZE.network("ConvNetD2"), SIZE, batch=10, at_once=1)
    of_class = 3 * 4 * features * 600  # all in one class here
    assert chosen.host - alone.host == 4 * features * 600 + of_class - own
    several = evaluation(tmp_path, random=True, herding=True, k_center=True, observer=observer)
    assert several.of({}).host == chosen.host
    assert several.of({}).disk[0].bytes == 2 * alone.disk[0].bytes
    on_gpu = evaluation(tmp_path, CUDA, forgetting=True, observer=observer, eval_at_once=1)
    assert on_gpu.of({}).device > 4 * features * 600


def test_an_evaluation_may_have_to_fit_the_whitening(tmp_path, has):
    fits = evaluation(tmp_path, of=distilled(zca=True)).of({})
    assert fits.disk[1].bytes == 4 * 192**2
    (tmp_path / "x_8_zca.pt").touch()
    kept = evaluation(tmp_path, of=distilled(zca=True)).of({})
    assert kept.disk[1].bytes == 0


def test_where_there_is_room_one_line_says_so(tmp_path, has, capsys):
    demand = distillation(tmp_path, CUDA)
    check_room(demand, CUDA, force=False)
    need = demand.of({})
    assert capsys.readouterr().out == (
        f"needs about {readable(need.device)} on the GPU (80 GB free), "
        f"{readable(need.host)} of memory (1.0 MB held by now, 80 GB free), "
        f"{readable(need.disk[0].bytes)} of disk in {tmp_path / 'r'} (80 GB free)\n"
    )
    check_room(distillation(tmp_path), CPU, force=False)
    assert "GPU" not in capsys.readouterr().out


def flags_in(message):
    """The changes that a message advises, as Demand knows them."""
    advice = message.rpartition(": ")[2].removesuffix(", or pass --force").split()
    pairs = [pair for pair in itertools.pairwise(advice) if pair[0].startswith("--")]
    return {flag: int(value) if value.isdecimal() else value for flag, value in pairs}


LARGE = replace(PLAN, micro_batch=10_000, eval_at_once=64)


@pytest.mark.parametrize(
    ("device", "options", "how"),
    [
        (CUDA, {}, LARGE),
        (CUDA, {"ipc": 100, "trajectories": 4}, LARGE),
        (CPU, {}, LARGE),
        (CPU, {"load_all": True}, PLAN),
        (CPU, {"load_all": True}, LARGE),
        (CPU, {"syn_steps": 80}, replace(PLAN, unroll="autograd")),
        (CPU, {"eval_it": 0}, LARGE),
        (CUDA, {"load_all": True}, replace(PLAN, compiled=True)),
    ],
)
def test_advice_is_true_and_no_more_than_is_needed(tmp_path, has, device, options, how):
    demand = distillation(tmp_path, device, how=how, **options)

    def amount(flags):
        need = demand.of(flags)
        return need.device if device.type == "cuda" and is_gpu else need.host - need.held

    seen = set()
    for is_gpu in {True, device.type == "cuda"} ^ {device.type == "cpu"}:
        least = amount({flag: values[-1] for flag, values in demand.flags.items() if values})
        for tenths in range(10):
            free = least + (amount({}) - least) * tenths // 10
            if free >= amount({}):
                continue
            has(**{"gpu" if is_gpu else "host": free})
            chosen = flags_in(short(demand, device))
            seen |= chosen.keys()
            assert amount(chosen) <= free
            for flag in chosen:
                assert amount({f: v for f, v in chosen.items() if f != flag}) > free
    assert seen


def test_memory_that_is_short_on_the_gpu(tmp_path, has):
    demand = distillation(tmp_path, CUDA, how=LARGE)
    has(gpu=demand.of({"--micro_batch": 2500, "--eval_at_once": 16}).device)
    message = short(demand, CUDA)
    assert message.startswith("too little memory on the GPU: about ")
    assert "GB are needed" in message
    assert "--micro_batch" in message


def test_memory_that_is_short_on_the_host(tmp_path, has):
    demand = distillation(tmp_path, load_all=True)
    has(host=demand.of({"--load_all": "false"}).host - HELD)
    message = short(demand)
    assert message.startswith("too little memory: about ")
    assert message.endswith(" are free: pass --load_all false, or pass --force")


def test_a_run_that_has_begun_keeps_its_experts(tmp_path, has):
    """It is refused with fewer, so that is no advice."""
    has(host=0)
    assert "--max_experts" in distillation(tmp_path, load_all=True).flags
    assert not distillation(tmp_path, load_all=True, iteration=5).flags["--max_experts"]


@pytest.mark.parametrize(("device", "what"), [(CUDA, "a GPU"), (CPU, "a machine")])
def test_where_no_flag_helps_none_is_named(tmp_path, has, device, what):
    has(gpu=0, host=10**6)
    how = replace(PLAN, micro_batch=1)
    for demand in (experts(tmp_path, device), distillation(tmp_path, device, how=how)):
        message = short(demand, device)
        assert f"are free: use {what} with more memory" in message
    message = short(distillation(tmp_path, device, how=LARGE, eval_it=0), device)
    assert f"even --micro_batch 1 takes {'1.0 GB' if device is CUDA else ''}" in message
    assert f"; use {what} with more memory" in message


def test_disk_that_is_short(tmp_path, has):
    demand = experts(tmp_path, num_experts=30)
    expert = demand.of({"--num_experts": 1}).disk[0].bytes / 2
    has(disk=25.5 * expert)
    message = short(demand)
    folder = tmp_path / "b"
    assert message == (
        f"too little disk: about {readable(40 * expert)} are needed in {folder}, "
        f"{readable(25.5 * expert)} are free: pass another --buffer_path or --num_experts 17, "
        "or pass --force"
    )  # 10 + 7 experts, six of them twice, one as it trains


def test_fewer_sets_need_less_disk(tmp_path, has):
    demand = distillation(tmp_path)
    has(disk=demand.of({"--save_it": 20}).disk[0].bytes)
    assert short(demand).endswith("pass another --save_path or --save_it 20, or pass --force")
    has(disk=0)
    assert short(demand).endswith("pass another --save_path, or pass --force")


def test_evaluations_need_a_disk_too(tmp_path, has):
    has(disk=0)
    assert "pass a copy of the set on another disk" in short(evaluation(tmp_path))


def test_folders_on_one_disk_share_it_and_caches_can_be_done_without(tmp_path, has, monkeypatch):
    run, cache = tmp_path / "r", tmp_path / "cache"
    need = Need(0, 0, 0, (Disk(run, 60, "another --save_path"), Disk(cache, 50)))
    demand = Demand(lambda flags: need, {})
    has(disk=100)
    message = short(demand)
    assert f"in {run} and {cache}" in message
    monkeypatch.setattr(room, "disk_of", lambda folder: folder.name)
    check_room(demand, CPU, force=False)
    has(disk=40)
    assert "cache" not in short(demand)


def test_by_force_it_is_only_a_warning(tmp_path, has, caplog):
    has(gpu=0, host=0, disk=0)
    check_room(distillation(tmp_path, CUDA), CUDA, force=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("going on by --force: too little memory on the GPU")
    for part in ("too little memory: ", "too little disk: "):
        assert part in record.getMessage()


def test_processes_of_one_machine_share_its_memory(tmp_path, has, monkeypatch):
    alone = distillation(tmp_path).of({})
    monkeypatch.setattr(ranks, "world", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(ranks, "least", lambda value: value)
    several = distillation(tmp_path, ipc=8)
    assert several.of({}).held == 4 * HELD
    assert several.of({}).host > 3 * alone.host
    assert several.flags["--nproc_per_node"] == []  # two machines with four each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert distillation(tmp_path, ipc=8).flags["--nproc_per_node"] == [4, 2, 1]
    odd = distillation(tmp_path, ipc=8, trajectories=24)
    assert odd.of({"--nproc_per_node": 4}).host < odd.of({}).host
    assert experts(tmp_path).flags["--num_experts"][-1] == 8


def test_what_one_process_lacks_stops_all_of_them(tmp_path, has, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "gather", lambda value: ["", "short there", value])
    with pytest.raises(UserError, match="short there, or pass --force"):
        check_room(distillation(tmp_path), CPU, force=False)
    assert capsys.readouterr().out.startswith("needs about ")
    has(disk=0)
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    monkeypatch.setattr(ranks, "gather", lambda value: [value])
    check_room(distillation(tmp_path), CPU, force=False)  # the disk is the main process's


def test_sizes_are_for_people():
    counts = (0, 12_345_678, 3_400_000_000, 78_400_000_000)
    assert [*map(readable, counts)] == ["1.0 MB", "12 MB", "3.4 GB", "78 GB"]


def test_processes_divide_batches_or_trajectories():
    def of(world, **options):
        options = replace(DISTILL, ipc=7, **options)
        return Workload.of(options, channels=3, num_classes=10, image_size=8, world=world)

    whole, part = of(1), of(4)
    assert (part.batch, part.whole_batch, part.students) == (18, 70, 1)
    assert part.step_flop == whole.step_flop // 4
    part = of(4, trajectories=8)
    assert (part.batch, part.students, part.divides_batches) == (70, 2, False)
    assert part.step_flop == 2 * whole.step_flop
    assert part.evaluation_flop == whole.evaluation_flop


@pytest.mark.parametrize("every", [0, 1, 7, 10, 50])
@pytest.mark.parametrize("end", [0, 1, 20, 50])
def test_evaluations_that_are_left(every, end):
    """As distill_att.py decides: at the multiples of eval_it, 0 among them, and at the end."""
    options = replace(DISTILL, Iteration=end, eval_it=every)
    points = [i for i in range(end + 1) if every and (i % every == 0 or i == end)]
    for evaluated in range(-1, end + 2):
        assert evaluations_left(options, evaluated) == sum(i > evaluated for i in points)


@pytest.mark.parametrize(
    ("seconds", "more", "line"),
    [
        ([30, 20, 4.8, 4.7, 4.9], {}, "about 4.8 s an iteration, 1.3 h left"),
        (
            [4.8],
            {"evaluations": 12, "evaluation_seconds": 40},
            "about 4.8 s an iteration, 1.5 h left with 12 evaluations of about 40 s",
        ),
        ([4.8], {"evaluations": 1}, "about 4.8 s an iteration, 1.3 h left and 1 evaluation"),
        ([90, 60], {"unit": "network"}, "about 1.2 min a network, 20.8 h left"),
    ],
)
def test_the_time_that_is_left(seconds, more, line):
    assert time_left(seconds, 1000, **more) == line


def test_durations_are_for_people():
    seconds = (0.0123, 4.84, 59, 90, 7200, 172_800 + 43_200)
    assert [*map(duration, seconds)] == ["0.012 s", "4.8 s", "59 s", "1.5 min", "2.0 h", "2.5 days"]


def test_times_are_expected_before_the_work(tmp_path):
    options = BufferOptions(model="ConvNetD2", train_epochs=4)
    line = expected_experts_time(
        options, source(tmp_path), CUDA, missing=100, at_once=10, compiled=True
    )
    assert line.startswith("about ")
    assert "an epoch" in line
    line = expected_distillation_time(DISTILL, source(tmp_path), PLAN, CPU, iteration=50)
    assert "an iteration" in line
    assert "with 11 evaluations of about" in line
    line = expected_distillation_time(
        DISTILL, source(tmp_path), PLAN, CPU, iteration=50, evaluated=50
    )
    assert "with 5 evaluations of about" in line


def test_images_held_out_are_decoded_with_the_others(tmp_path):
    whole, divided = (source(tmp_path, pictures=True, train=n, val=600 - n) for n in (600, 540))
    assert DataSize.of(divided) == replace(SIZE, train=540, val=60)
    decoded = [cache_bytes(each, ("train", "test"), fits=False) for each in (whole, divided)]
    assert decoded == [800 * SIZE.values] * 2
