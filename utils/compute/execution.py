"""How functions of tensors are executed: as they are, compiled, replayed as CUDA graphs, in rows.

The inner step, its adjoint and the training step are pure functions of fixed shapes, called
thousands of times. For small batches their cost is that of launching kernels, not of arithmetic:
compiling fuses kernels, a CUDA graph launches all of them at once.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from utils.compute.channels_last import with_channels_last
from utils.compute.winograd import with_winograd
from utils.core.errors import UserError

# Tensors in, a tuple of tensors out.
Function = Callable[..., tuple[Tensor, ...]]

# Compiled functions of one kind that are kept: networks times batch shapes.
KEPT_COMPILATIONS = 64
# Calls that follow one another and are captured in one CUDA graph.
CAPTURED_CALLS = 16
# Streams that rows are spread over.
MAX_BRANCHES = 8


@dataclass(frozen=True)
class Execution:
    """How functions run. None of it changes a result but by rounding.

    Attributes:
        compiled: by torch.compile.
        cuda_graphs: "on" or "off"; "auto": on, and off where capturing fails.
        vectorised: several rows as one call of vmap.
        branched: several rows as parallel branches, each on a stream of its own.
        winograd: convolutions by Winograd's scheme, for CPUs.
        channels_last: channels innermost in convolutions and instance norms, for GPUs.
        combined: independent small kernels are launched as one.
        unsplit: sums over pixels take one kernel each, not two.
        pruned: derivatives that nobody uses are left out.
    """

    compiled: bool = False
    cuda_graphs: str = "off"
    vectorised: bool = False
    branched: bool = False
    winograd: bool = False
    channels_last: bool = False
    combined: bool = False
    unsplit: bool = False
    pruned: bool = False

    def __post_init__(self) -> None:
        if self.compiled:
            torch._dynamo.config.recompile_limit = KEPT_COMPILATIONS

    @classmethod
    def on(cls, device: torch.device, *, compiled: bool, cuda_graphs: str = "auto") -> "Execution":
        """What suits `device`.

        A CPU computes row by row, because there a grouped convolution is slower than its parts.
        """
        if device.type != "cuda":
            return cls(compiled=compiled, winograd=compiled and device.type == "cpu")
        return cls(
            compiled=compiled,
            cuda_graphs=cuda_graphs,
            vectorised=not compiled,
            branched=compiled,
            channels_last=compiled,
            combined=compiled,
            pruned=compiled,
        )

    def where(self, *, vectorises: bool) -> "Execution":
        """The same for a function that vmap may not know: then row by row."""
        return replace(self, vectorised=self.vectorised and vectorises)

    def adapt(self, network: nn.Module) -> nn.Module:
        """`network` with its convolutions as they are to run."""
        if self.winograd:
            return with_winograd(network)
        return with_channels_last(network) if self.channels_last else network

    def is_plain(self, rows: int) -> bool:
        """Whether functions run as they stand. Then torch.autograd is the faster way to gradients;
        compiled or vectorised, they have to come from torch.func.
        """
        return not (self.compiled or (self.vectorised and rows > 1))

    def prepare(self, function: Function, *, rows: int = 1) -> Function:
        """`function`, to be called on stacks of its arguments with `rows` rows each."""
        return self.capture(self.in_rows(function, rows))

    def in_rows(self, function: Function, rows: int) -> Function:
        """The same, not captured by itself: as a part of what is captured."""
        together = self.vectorised and rows > 1
        if together:
            function = torch.func.vmap(function, randomness="different")
        if self.compiled:
            function = torch.compile(
                function, dynamic=False, fullgraph=True, options=self.compiler_options() or None
            )
        if together:
            return function
        return _in_branches(function) if self.branched and rows > 1 else _row_by_row(function)

    def capture(self, function: Function) -> Function:
        """`function`, replayed as a CUDA graph."""
        if self.cuda_graphs == "off":
            return function
        return _Replayed(function, must=self.cuda_graphs == "on")

    @property
    def calls_at_once(self) -> int:
        """How many calls that follow one another are best captured together: launching what lies
        between them costs more than the kernels themselves. One without CUDA graphs.
        """
        return 1 if self.cuda_graphs == "off" else CAPTURED_CALLS

    def compiler_options(self) -> dict[str, Any]:
        """What torch.compile is told, `options` of it."""
        options: dict[str, Any] = {}
        if self.combined:
            options["combo_kernels"] = True
        if self.unsplit:
            options["split_reductions"] = False
        if self.pruned:
            from utils.compute.pruned_graph import PruneConvolutions  # imports the compiler

            options["post_grad_custom_pre_pass"] = PruneConvolutions()
        return options


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


def _in_branches(function: Function) -> Function:
    """Row by row, each row on a stream of its own, so that small kernels share the device."""

    def on_rows(*stacks: Tensor) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream()
        streams = [_stream(stacks[0].device, row % MAX_BRANCHES) for row in range(len(stacks[0]))]
        results = []
        for stream, row in zip(streams, zip(*stacks, strict=True), strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(function(*row))
        for stream in streams:
            here.wait_stream(stream)
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return on_rows


class _Replayed:
    """A function captured as a CUDA graph at the first call for given shapes, replayed after.

    All graphs share one pool of memory: they are replayed one after another, and what they return
    is copied out of it at once. Where capturing fails, calls of those shapes go on without, unless
    it `must` succeed.
    """

    def __init__(self, function: Function, *, must: bool) -> None:
        self._function = function
        self._must = must
        self._graphs: dict[Any, _Graph | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._captured(inputs)
        graph = self._graphs[key]
        return self._function(*inputs) if graph is None else graph(inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> "_Graph | None":
        _warm_up(self._function, inputs)
        try:
            return _Graph.of(self._function, inputs)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None  # whoever calls asks for less
            if self._must or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logging.getLogger(__name__).warning(
                "cuda_graphs auto: going on without, capturing failed: %s", reason
            )
            return None


@dataclass(frozen=True)
class _Graph:
    """A captured call, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        outputs = [torch.empty_like(output) for output in self.outputs]
        torch._foreach_copy_(outputs, self.outputs)  # the next replay overwrites them
        return tuple(outputs)

    @classmethod
    def of(cls, function: Function, inputs: Sequence[Tensor]) -> "_Graph":
        static_inputs = [tensor.detach().clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        pool, _ = _shared_pool(inputs[0].device)
        # Only calls of this thread are refused while capturing: another one prefetches.
        with _undisturbed(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            static_outputs = list(function(*static_inputs))
        return cls(graph, static_inputs, static_outputs)


def _warm_up(function: Function, inputs: Sequence[Tensor]) -> None:
    """Compile, and let the libraries choose their kernels."""
    stream = _stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)


@cache
def _stream(device: torch.device, branch: int = -1) -> torch.cuda.Stream:
    """Of a branch, or to warm up; few, as libraries keep a workspace for every one they see."""
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
