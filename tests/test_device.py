"""--device: where a process computes, and what is refused."""

import pytest
import torch

import buffer
import distill_att
import eval as script
from utils.compute import device
from utils.compute.device import default_device, parse_device, use_device, use_precision
from utils.compute.execution import Execution
from utils.core.errors import UserError
from utils.core.provenance import describe_environment
from utils.plan.choose import choose_compile
from utils.plan.machine import Machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    use_device(None)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two CUDA devices, as far as torch is asked; the number of the one in use."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: current.__setitem__(0, number))
    return current


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    "text", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:256", "cpu:0", "mps:0", "", "CPU"]
)
def test_a_device_that_there_is_nowhere_is_refused_with_the_choices(text):
    with pytest.raises(ValueError, match=r"choices: auto, cpu, cuda, cuda:N .*or mps"):
        parse_device(text)
    for parse in (buffer.parse, distill_att.parse, script.parse):
        with pytest.raises(UserError, match="--device: unknown device"):
            parse(["--device", text])


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:3", "mps"])
def test_a_device_that_is_not_here_is_refused_before_the_work(asked, no_gpu, tmp_path):
    with pytest.raises(UserError, match=f"--device {asked} is not there; choose cpu$"):
        buffer.main(
            ["--dataset", "digits", "--device", asked, "--buffer_path", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_auto_is_cuda_where_it_is_there(two_gpus):
    assert use_device(None) == torch.device("cuda:0")
    assert script.parse(["--device", "auto"]).device is None


def test_one_of_several_gpus_can_be_chosen(two_gpus):
    assert use_device("cuda:1") == default_device() == torch.device("cuda:1")
    assert use_device("cuda") == torch.device("cuda:1")  # the current one
    with pytest.raises(UserError, match=r"cuda:2 is not there; choose cpu, cuda, cuda:0, cuda:1$"):
        use_device("cuda:2")


def test_the_cpu_can_be_chosen_beside_gpus(two_gpus):
    assert use_device("cpu") == default_device() == CPU
    assert use_precision(None, default_device()) == "fp32"
    assert describe_environment(default_device())["device"].startswith("CPU")


def test_torchrun_gives_each_process_its_gpu(two_gpus, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert use_device(None) == use_device("cuda") == torch.device("cuda:1")
    assert use_device("cpu") == CPU
    with pytest.raises(UserError, match="cuda:1 is one GPU, torchrun gives each process its own"):
        use_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 .* no GPU of its own, there are 2: .*cpu"):
        use_device(None)


def test_mps_has_no_float64_no_graphs_and_nothing_compiled_by_itself(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: False)
    assert use_device("mps") == default_device() == torch.device("mps")
    assert use_precision(None, default_device()) == "fp32"
    for precision in ("fp64", "tf32", "bf16"):
        with pytest.raises(UserError, match=r"this MPS has none; choose fp32$"):
            use_precision(precision, default_device())
    execution = Execution.on(default_device(), compiled=True, cuda_graphs="on")
    assert execution == Execution(compiled=True)
    machine = Machine("mps", free=2**40, host=2**40, held=0, speed=device_speed())
    assert not choose_compile("auto", machine, 10.0**6, layers=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="mps is one device: leave torchrun out"):
        use_device("mps")


def device_speed():
    return Machine.here(CPU).speed


def test_the_device_may_change_between_the_calls_of_a_run():
    fields = {field.name: field for field in buffer.BufferOptions.__dataclass_fields__.values()}
    assert fields["device"].metadata["may_change"]
    assert device.default_device() == use_device(None)
