"""How functions of tensors are executed: as they are, compiled, replayed as CUDA graphs, in rows.

The inner step, its adjoint and the training step are pure functions of fixed shapes, called
thousands of times. For small batches their cost is that of launching kernels, not of arithmetic:
compiling fuses kernels, a CUDA graph launches all of them at once.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from utils.compute.winograd import with_winograd
from utils.core.errors import UserError

# Tensors in, a tuple of tensors out.
Function = Callable[..., tuple[Tensor, ...]]

# Compiled functions of one kind that are kept: networks times batch shapes.
KEPT_COMPILATIONS = 64


@dataclass(frozen=True)
class Execution:
    """Whether functions are compiled, whether they are captured in CUDA graphs, whether several
    rows are computed together (vmap) and whether convolutions run by Winograd's scheme.
    """

    compiled: bool = False
    cuda_graphs: bool = False
    vectorised: bool = False
    winograd: bool = False

    def __post_init__(self) -> None:
        if self.compiled:
            torch._dynamo.config.recompile_limit = KEPT_COMPILATIONS

    @classmethod
    def on(cls, device: torch.device, *, compiled: bool, replayed: bool = True) -> "Execution":
        """What suits `device`; `replayed` allows CUDA graphs.

        A CPU computes row by row, because there a grouped convolution is slower than its parts.
        """
        if device.type == "cuda":
            return cls(compiled=compiled, cuda_graphs=replayed, vectorised=True)
        return cls(compiled=compiled, winograd=compiled)

    def adapt(self, network: nn.Module) -> nn.Module:
        """`network` with its convolutions as they are to run."""
        return with_winograd(network) if self.winograd else network

    def is_plain(self, rows: int) -> bool:
        """Whether functions run as they stand. Then torch.autograd is the faster way to gradients;
        compiled or vectorised, they have to come from torch.func.
        """
        return not (self.compiled or (self.vectorised and rows > 1))

    def prepare(self, function: Function, *, rows: int = 1) -> Function:
        """`function`, to be called on stacks of its arguments with `rows` rows each."""
        together = self.vectorised and rows > 1
        if together:
            function = torch.func.vmap(function)
        if self.compiled:
            function = torch.compile(function, dynamic=False, fullgraph=True)
        if not together:
            function = _row_by_row(function)
        return _Replayed(function) if self.cuda_graphs else function


PLAIN = Execution()


def check_compiles(device: torch.device) -> None:
    """Raise UserError where torch.compile does not work, as without a C++ compiler."""
    try:
        with torch.no_grad():
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a compiler that is missing or broken fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--compile on: compiling fails here ({reason}); install a C++ compiler (g++) "
            "or pass --compile off"
        ) from None


def _row_by_row(function: Function) -> Function:
    def on_rows(*stacks: Tensor) -> tuple[Tensor, ...]:
        results = [function(*row) for row in zip(*stacks, strict=True)]
        if len(results) == 1:
            return tuple(result[None] for result in results[0])
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return on_rows


class _Replayed:
    """A function captured as a CUDA graph at the first call for given shapes, replayed after.

    All graphs share one pool of memory: they are replayed one after another, and what they return
    is copied out of it at once.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, static_inputs, static_outputs = self._graphs[key]
        torch._foreach_copy_(static_inputs, list(inputs))
        graph.replay()
        return tuple(output.clone() for output in static_outputs)  # the next replay overwrites them

    def _capture(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        static_inputs = [tensor.detach().clone() for tensor in inputs]
        stream = _warm_up_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile, and let the libraries choose their kernels
            for _ in range(3):
                self._function(*static_inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool, _ = _shared_pool(inputs[0].device)
        # Only calls of this thread are refused while capturing: another one prefetches.
        with _undisturbed(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            static_outputs = list(self._function(*static_inputs))
        return graph, static_inputs, static_outputs


@cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


@cache
def _shared_pool(device: torch.device) -> tuple[Any, torch.cuda.CUDAGraph]:
    """The pool, and an empty graph that keeps it alive when all others are let go."""
    pool, empty = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is empty
        with torch.cuda.graph(empty, pool=pool, capture_error_mode="thread_local"):
            pass
    return pool, empty


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Capture with no garbage collection, which might destroy an older graph and end the capture,
    and with a workspace of cuBLAS that no other graph relies on, before and after.
    """
    gc.collect()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        gc.enable()
