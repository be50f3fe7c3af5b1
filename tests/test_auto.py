"""What the work costs, how much memory there is, and what `auto` makes of the two."""

import pytest
import torch

from networks import NETWORKS
from utils.compute import execution
from utils.compute.cost import (
    ADJOINT_COPIES,
    TRAINING_COPIES,
    TRAINING_VECTORS,
    NetworkCost,
    adjoint_bytes,
    expert_bytes,
    full_graph_bytes,
    inference_bytes,
    network_cost,
    outer_step_flop,
    pieces_within,
    training_bytes,
    training_flop,
)
from utils.core.errors import UserError
from utils.plan import auto, memory
from utils.plan.auto import choose_at_once, choose_compile, choose_micro_batch, choose_unroll
from utils.plan.memory import disk_of, free_bytes, free_disk_bytes, held_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 2**30
CIFAR10 = {"channels": 3, "num_classes": 10, "image_size": 32}
COST = NetworkCost(parameters=1_000, layers=4, flop=10_000, activation_bytes=2**20)


def test_the_arithmetic_of_a_convnet_is_that_by_hand():
    """Three 3x3 convolutions of 128 channels on 32, 16 and 8 pixels a side, then 2048 -> 10."""
    cost = network_cost("ConvNetD3", **CIFAR10)
    products = 32**2 * 128 * 3 * 9 + 16**2 * 128 * 128 * 9 + 8**2 * 128 * 128 * 9 + 2048 * 10
    assert cost.flop == 2 * products
    assert cost.parameters == 320_010
    assert cost.layers == 4
    # of each block what convolution, norm and activation put out, and the pooling of half the side
    outputs = sum(128 * (3 * side**2 + (side // 2) ** 2) for side in (32, 16, 8)) + 10
    assert cost.activation_bytes == 4 * outputs


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


def test_a_hundred_experts_take_what_the_field_reports():
    """6.5 GB for 50 epochs of ConvNetD3 on CIFAR-10, with the snapshot before the first."""
    one = expert_bytes(network_cost("ConvNetD3", **CIFAR10), epochs=50)
    assert one == 51 * 320_010 * 4
    assert round(100 * one / 1e9, 1) == 6.5


def test_work_is_proportional_to_images_and_steps():
    assert training_flop(COST, images=7, epochs=5) == 3 * 10_000 * 7 * 5
    assert training_flop(COST, images=7, epochs=5, flat=True) == 2 * 3 * 10_000 * 7 * 5
    step = outer_step_flop(COST, syn_steps=1, batch=1)
    assert step > training_flop(COST, images=1, epochs=2)  # forward and reverse sweep
    assert outer_step_flop(COST, syn_steps=20, batch=30) == 600 * step


def test_only_the_full_graph_grows_with_syn_steps():
    assert adjoint_bytes(COST, 10) == ADJOINT_COPIES * 10 * 2**20
    few, many = (full_graph_bytes(COST, syn_steps=n, batch=10) for n in (10, 40))
    assert many == 4 * few > adjoint_bytes(COST, 10)


def test_training_keeps_activations_twice_and_some_vectors():
    assert training_bytes(COST, 0) == TRAINING_VECTORS * 4 * 1_000
    assert training_bytes(COST, 10) - training_bytes(COST, 0) == TRAINING_COPIES * 10 * 2**20
    assert inference_bytes(COST, 10) == 5 * 2**20


@pytest.mark.parametrize(
    ("batch", "limit", "size"),
    [(10, 10, 10), (10, 99, 10), (10, 9, 5), (10, 4, 4), (9, 4, 3), (10, 1, 1), (10, 0, 1)],
)
def test_pieces_are_equal_and_within_the_limit(batch, limit, size):
    assert pieces_within(batch, limit) == size


@pytest.fixture
def compiles(monkeypatch):
    """As on a machine with a compiler, without calling it; counts how often it is tried."""
    tried = []
    monkeypatch.setattr(auto, "check_compiles", lambda device: tried.append(1))
    return tried


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(function, **keywords):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nset TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", fail)


@pytest.mark.parametrize("work", ["outer steps", "training"])
def test_only_a_long_run_is_compiled(compiles, capsys, work):
    hour = 3600 * auto.CPU_THREAD_RATE * torch.get_num_threads()
    assert not choose_compile("auto", hour / 3600, CPU, work=work, layers=4)
    printed = capsys.readouterr().out
    assert printed == ""  # a table of evaluations is not interrupted
    assert compiles == []  # nobody waits for a trial
    assert choose_compile("auto", 2 * hour, CPU, work=work, layers=4)
    assert capsys.readouterr().out.startswith(f"compile auto: on, about 2.0 h of {work}, ")
    assert compiles == [1]


def test_what_is_long_depends_on_what_is_to_be_compiled(compiles):
    """An hour pays for 4 layers, not for 400."""
    flop = 3600 * auto.CPU_THREAD_RATE * torch.get_num_threads()
    assert choose_compile("auto", flop, CPU, work="training", layers=4)
    assert not choose_compile("auto", flop, CPU, work="training", layers=400)


def test_what_is_long_depends_on_the_machine(compiles, monkeypatch):
    flop = 3600 * auto.CPU_THREAD_RATE
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_compile("auto", flop, CPU, work="outer steps", layers=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not choose_compile("auto", flop, CPU, work="outer steps", layers=4)
    assert not choose_compile("auto", flop, CUDA, work="outer steps", layers=4)


@pytest.mark.parametrize(
    ("asked", "chosen"), [("on", True), (True, True), ("off", False), (False, False)]
)
def test_what_is_asked_for_is_done(compiles, capsys, asked, chosen):
    for flop in (1.0, 1e30):
        assert choose_compile(asked, flop, CPU, work="training", layers=4) is chosen
    assert capsys.readouterr().out == ""
    assert compiles == [1, 1] * chosen


def test_compile_on_without_a_compiler_is_one_line(no_compiler):
    with pytest.raises(UserError) as error:
        choose_compile("on", 1.0, CPU, work="training", layers=4)
    message = str(error.value)
    assert "\n" not in message
    for part in ("--compile on", "No working C++ compiler", "g++", "--compile off"):
        assert part in message


def test_without_a_compiler_auto_is_off_and_says_why(no_compiler, capsys):
    assert not choose_compile("auto", 1e30, CPU, work="training", layers=4)
    printed = capsys.readouterr().out
    assert printed.startswith("compile auto: off, ")
    assert "compiling fails here" in printed
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_compiling_is_tried_for_real():
    """Passes where there is a compiler; elsewhere it is the UserError."""
    execution.check_compiles(CPU)


UNROLL = {"compiled": False, "divided": False, "syn_steps": 10, "images": 10}


def have(monkeypatch, free):
    monkeypatch.setattr(auto, "free_bytes", lambda device: free)


def test_a_small_graph_on_a_cpu_is_kept_whole(monkeypatch, capsys):
    graph = full_graph_bytes(COST, syn_steps=10, batch=10)
    have(monkeypatch, 10 * graph + 1)
    assert choose_unroll("auto", COST, CPU, **UNROLL) == "autograd"
    assert capsys.readouterr().out == "unroll auto: autograd, whose graph takes about 0.21 GB\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"compiled": True},
        {"divided": True},
        {"syn_steps": 11},
        {"images": 11},
        {"device": CUDA},
    ],
    ids=str,
)
def test_otherwise_it_is_swept(monkeypatch, capsys, changes):
    have(monkeypatch, 10 * full_graph_bytes(COST, syn_steps=10, batch=10) + 1)
    settings = {"device": CPU} | UNROLL | changes
    assert choose_unroll("auto", COST, **settings) == "adjoint"
    assert capsys.readouterr().out == "unroll auto: adjoint\n"


def test_the_engine_that_is_asked_for_is_taken(monkeypatch, capsys):
    have(monkeypatch, 0)
    assert choose_unroll("autograd", COST, CUDA, **UNROLL | {"compiled": True}) == "autograd"
    have(monkeypatch, 1000 * GB)
    assert choose_unroll("adjoint", COST, CPU, **UNROLL) == "adjoint"
    assert choose_unroll("adjoint", COST, CPU, **UNROLL | {"divided": True}) == "adjoint"
    assert capsys.readouterr().out == ""


def test_a_full_graph_of_divided_batches_is_refused():
    with pytest.raises(UserError) as error:
        choose_unroll("autograd", COST, CPU, **UNROLL | {"divided": True})
    for part in ("--unroll autograd", "--micro_batch", "torchrun", "--unroll adjoint"):
        assert part in str(error.value)


def test_a_short_run_on_a_cpu_stays_simple(monkeypatch):
    """The README's run on digits: nothing is compiled, and the small graph is kept whole."""
    have(monkeypatch, 8 * GB)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cost = network_cost("ConvNetD2", channels=1, num_classes=10, image_size=8)
    flop = 100 * outer_step_flop(cost, syn_steps=10, batch=10)
    assert not choose_compile("auto", flop, CPU, work="outer steps", layers=4)
    chosen = choose_unroll("auto", cost, CPU, **UNROLL)
    assert chosen == "autograd"


def test_the_rows_of_cifar10_on_a_cpu_are_compiled(compiles, monkeypatch):
    have(monkeypatch, 8 * GB)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cost = network_cost("ConvNetD3", **CIFAR10)
    flop = 6_000 * outer_step_flop(cost, syn_steps=80, batch=10)
    assert choose_compile("auto", flop, CPU, work="outer steps", layers=4)
    settings = {"compiled": True, "divided": False, "syn_steps": 80, "images": 10}
    assert choose_unroll("auto", cost, CPU, **settings) == "adjoint"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("students", [1, 4])
@pytest.mark.parametrize("free", [GB // 4, GB, 80 * GB, 10_000 * GB])
def test_micro_batches_bound_the_memory(monkeypatch, device, free, students):
    have(monkeypatch, free)
    size = choose_micro_batch(None, COST, device, batch=5_000, students=students)
    budget = min(auto.WORKING_SET[device.type], free // 2)
    held = adjoint_bytes(COST, size * students)
    assert held <= budget
    assert 2 * (held + adjoint_bytes(COST, students)) > budget  # and is not much smaller


def test_micro_batches_are_no_larger_than_the_batch_and_never_empty(monkeypatch):
    have(monkeypatch, 80 * GB)
    assert choose_micro_batch(None, COST, CPU, batch=20, students=1) == 20
    assert choose_micro_batch(64, COST, CPU, batch=100, students=1) == 64
    assert choose_micro_batch(640, COST, CPU, batch=100, students=1) == 100
    have(monkeypatch, 0)
    assert choose_micro_batch(None, COST, CPU, batch=100, students=1) == 1
    assert choose_micro_batch(64, COST, CPU, batch=100, students=1) == 64  # by hand


def test_how_many_networks_train_at_once(monkeypatch):
    have(monkeypatch, 80 * GB)
    assert choose_at_once(None, COST, CPU, batch=1, networks=10) == 1
    assert choose_at_once(None, COST, CUDA, batch=1, networks=10) == 10
    assert choose_at_once(None, COST, CUDA, batch=511, networks=10) == 3  # of 1 GB each
    assert choose_at_once(None, COST, CUDA, batch=10**6, networks=10) == 1
    assert choose_at_once(4, COST, CPU, batch=10**6, networks=10) == 4
    assert choose_at_once(40, COST, CUDA, batch=1, networks=10) == 10
    have(monkeypatch, 3 * GB)
    assert choose_at_once(None, COST, CUDA, batch=511, networks=10) == 1


def set_limit(monkeypatch, tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * GB})
    )


def test_a_container_limits_the_memory(monkeypatch, tmp_path):
    stat = f"anon {GB}\nfile {GB}\n"
    set_limit(monkeypatch, tmp_path, max=f"{5 * GB}\n", current=f"{2 * GB}\n", stat=stat)
    assert free_bytes(CPU) == 3 * GB


def test_pages_of_files_in_a_container_are_free(monkeypatch, tmp_path):
    stat = f"anon {GB}\nfile {2 * GB}\ninactive_file {GB}\nactive_file {GB}\n"
    set_limit(monkeypatch, tmp_path, max=f"{5 * GB}\n", current=f"{3 * GB}\n", stat=stat)
    assert free_bytes(CPU) == 4 * GB


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"max": "max\n", "current": "0\n"},
        {"max": "1000\n"},
        {"max": f"{50 * GB}", "current": "0"},
    ],
    ids=["none", "unlimited", "half there", "more than there is"],
)
def test_without_such_a_limit_it_is_what_the_host_has(monkeypatch, tmp_path, files):
    set_limit(monkeypatch, tmp_path, **files)
    assert free_bytes(CPU) == 8 * GB


def test_this_machine_has_memory_of_which_this_process_holds_some():
    assert 0 < free_bytes(CPU) < 10**15
    assert 10**8 < held_bytes() < 10**12  # torch is loaded


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path):
    folder = tmp_path / "not/there/yet"
    assert free_disk_bytes(folder) == pytest.approx(free_disk_bytes(tmp_path), rel=0.1)
    assert disk_of(folder) == disk_of(tmp_path) == tmp_path.stat().st_dev


@pytest.mark.parametrize("error", [RuntimeError(), AssertionError("")])
def test_a_compiler_that_fails_without_a_word(monkeypatch, error):
    def fail(function, **keywords):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=f"--compile on.*{type(error).__name__}"):
        execution.check_compiles(CPU)
