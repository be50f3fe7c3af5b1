"""Generate the code that torch.compile runs on an H100 (sm_90), on a machine without a GPU.

    python -m tests.sm90 gradient --batch 10

The function is traced on fake tensors of the CPU, derivatives included, because autograd's engine
takes no fake CUDA tensors. Its graph then goes through the whole compiler on fake CUDA tensors,
while torch's questions about the device are answered as an H100 would. The generated code runs on
fake tensors, which counts its launches and shows the layouts; triton compiles every kernel of it to
machine code. Prints one line of JSON. A process of its own, since the answers are patched in for
good.
"""

import argparse
import json
from contextlib import ContextDecorator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.utils import fresh_cache
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from utils.compute.cohort import Recipe, _training_step
from utils.compute.device import use_precision
from utils.compute.execution import Execution, Function
from utils.compute.flat import FlatNetwork
from utils.methods.unroll.steps import Steps

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CLASSES, CHANNELS, SIDE = 10, 3, 32

H100 = SimpleNamespace(
    name="NVIDIA H100",  # as torch's table of data sheets has it
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
NO_LAUNCH = ("empty_strided", "as_strided", "device")


class Unprepared(Execution):
    """What suits a device, but functions of one row as the compiler gets them."""

    def in_rows(self, function: Function, rows: int) -> Function:
        return function


class Launches(TorchDispatchMode):
    """Count what generated code launches while it runs on fake tensors.

    An output of `convolution_backward` is a kernel of cuDNN; `nhwc` are the convolutions, forward
    and backward, all of whose tensors have channels innermost; `other` is what nobody expects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[str, str]] = []  # (name, source), as the code defines them
        names = "triton products forward backward outputs nhwc other"
        self.counts = dict.fromkeys(names.split(), 0)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func is aten.convolution.default:
            self.counts["forward"] += 1
            self.counts["nhwc"] += channels_last(args[:2])
        elif func is aten.convolution_backward.default:
            self.counts["backward"] += 1
            self.counts["outputs"] += sum(args[-1])
            self.counts["nhwc"] += channels_last(args[:3])
        elif name in MATRIX_PRODUCTS:
            self.counts["products"] += 1
        elif name not in NO_LAUNCH:
            self.counts["other"] += 1
        return kwargs["out"] if "out" in kwargs else func(*args, **kwargs)


def channels_last(tensors: tuple[Tensor, ...]) -> bool:
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def answer_as_h100() -> None:
    """Patch the questions that torch and triton ask about the device. Irrevocable."""
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        of_interface = name.removeprefix("_")
        if of_interface in vars(CudaInterface):  # which keeps copies
            setattr(CudaInterface, of_interface, staticmethod(answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: H100)
    fake_tensor.init_gpu_context = lambda device: None
    # Patterns that the compiler looks for are traced with gradients: on the CPU, too.
    patterns = joint_graph.lazy_init
    joint_graph.lazy_init = lambda device: patterns(torch.device("cpu"))
    folder = joint_graph.UniformValueConstantFolder
    folder.run = _ConstantsOnCPU()(folder.run)
    triton_helpers.set_driver_to_gpu = lambda: None
    target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    memory = {"mem_clock_rate": 2_619_000, "mem_bus_width": 5120}  # kHz, bits
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_device_interface=lambda: torch.cuda,
            utils=SimpleNamespace(get_device_properties=lambda device: memory),
        )
    )


class _ConstantsOnCPU(TorchDispatchMode, ContextDecorator):
    """Make constants that the compiler folds on the CPU, whatever device they are for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def function_and_inputs(
    name: str, execution: Execution, batch: int
) -> tuple[Function, list[Tensor]]:
    """The function that the compiler gets, and inputs of the right shapes, on the CPU."""
    recipe = Recipe(
        "ConvNetD3", CHANNELS, CLASSES, SIDE, momentum=0.0, weight_decay=0.0, execution=execution
    )
    network = recipe.build(seed=0)
    theta = torch.empty(sum(param.numel() for param in network.parameters()))
    x, y = torch.empty(batch, CHANNELS, SIDE, SIDE), torch.zeros(batch, dtype=torch.int64)
    if name == "training":
        step = _training_step(recipe, 1, torch.device("cpu"))
        return step, [theta, theta, torch.empty(0), x, y, torch.empty(())]
    flat = FlatNetwork(execution.adapt(network))
    steps = Steps.of(lambda theta, x, y: F.cross_entropy(flat(theta, x), y), execution)
    if name == "gradient":
        return steps.gradient, [theta, x, y]
    return steps.adjoint, [theta, x, y, theta]


def traced(function: Function, inputs: list[Tensor]) -> GraphModule:
    """The graph of `function`, its constants on CUDA."""
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    return graph


def generated_code(graph: GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> str:
    """What inductor makes of the graph, with the options of torch.compile."""

    class Generated(BaseException):  # no Exception, which the compiler would wrap
        pass

    def stop(code: str) -> None:
        raise Generated(code)

    GraphLowering.save_output_code = staticmethod(stop)
    try:
        compile_fx.compile_fx(graph, inputs, config_patches=options)
    except Generated as generated:
        return generated.args[0]
    raise AssertionError("the compiler has generated no code")


def run(code: str, inputs: list[Tensor]) -> Launches:
    """Run generated code on fake CUDA tensors and count its launches."""
    launches = Launches()

    def kernel(self: AsyncCompile, name: str, source: str, **_: Any) -> SimpleNamespace:
        launches.kernels.append((name, source))
        return SimpleNamespace(run=launch)

    def launch(*_: Any, **__: Any) -> None:
        launches.counts["triton"] += 1

    AsyncCompile.triton = kernel
    AsyncCompile.wait = lambda self, scope: None
    module: dict[str, Any] = {"__name__": "generated"}
    exec(compile(code, "generated", "exec"), module)
    module |= {  # what goes past the dispatcher and would ask for memory or a device
        "get_raw_stream": lambda device: 0,
        "copy_misaligned": lambda tensor: tensor,
        "assert_alignment": lambda *_: None,
        "reinterpret_tensor": torch.as_strided,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device=CUDA
        ),
    }
    with launches:
        module["call"](list(inputs))
    return launches


def compile_kernels(kernels: list[tuple[str, str]]) -> int:
    """Compile the first configuration of every kernel to machine code; how many there were."""
    for name, source in kernels:
        tuner = getattr(PyCodeCache.load(source), name)
        try:
            binary = tuner._precompile_config(tuner.configs[0]).kernel
        except Exception as error:
            raise SystemExit(f"{source}\n{name} does not compile for sm_90: {error}") from error
        assert binary.asm["cubin"], name
    return len(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("function", choices=("gradient", "adjoint", "training"))
    parser.add_argument("--batch", type=int, default=10)
    args = parser.parse_args()

    answer_as_h100()
    use_precision(None, CUDA)
    execution = Unprepared.on(CUDA, compiled=True)
    function, inputs = function_and_inputs(args.function, execution, args.batch)
    graph = traced(function, inputs)
    with (
        fresh_cache(),
        config.patch(force_disable_caches=True, compile_threads=1, use_static_cuda_launcher=False),
        torch.no_grad(),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty_like(tensor, device=CUDA) for tensor in inputs]
            launches = run(generated_code(graph, fakes, execution.compiler_options()), fakes)
        kernels = compile_kernels(launches.kernels)
    if not launches.counts["triton"] or not kernels:
        raise SystemExit("no Triton kernel in the generated code")
    print(json.dumps(launches.counts | {"kernels": kernels}))


if __name__ == "__main__":
    main()
