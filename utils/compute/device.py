"""Where networks compute, and in what precision; parameters and images stay as they are.

A device is chosen once for the whole process, and so is what float32 products run in.

fp32  products and sums in float32
tf32  products of matrices and convolutions with 10 bits of mantissa, as the field's run on CUDA
bf16  the network in bfloat16, 7 bits of mantissa; loss and parameters in float32
fp64  everything in float64, for proofs
"""

import sys
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch

from utils.core import ranks
from utils.core.errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16", "fp64")
GPUS = 128  # that torch can number; it wraps larger numbers around
DEVICES = "auto, cpu, cuda, cuda:N (the number of a GPU) or mps"

_asked: torch.device | None = None  # None: whatever is there


def parse_device(text: str) -> torch.device:
    """The device that `text` names, here or elsewhere; ValueError names the choices."""
    kind, colon, number = text.partition(":")
    is_numbered = kind == "cuda" and number in map(str, range(GPUS))
    if kind not in ("cpu", "cuda", "mps") or (colon and not is_numbered):
        raise ValueError(f"unknown device {text!r}; choices: {DEVICES}")
    return torch.device(kind, int(number)) if colon else torch.device(kind)


def use_device(asked: str | None) -> torch.device:
    """Let this process compute on the device that is `asked` for, from now on; returns it.

    None stands for CUDA where it is there, else the CPU. Under torchrun each process has the CUDA
    device of its number. UserError where there is no such device.
    """
    global _asked
    _asked = None if asked is None else parse_device(asked)
    kind = _asked.type if _asked is not None else default_device().type
    if kind == "cuda":
        _use_cuda(asked)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"--device mps is not there; choose {_choices()}")
        if ranks.under_torchrun():
            raise UserError("--device mps is one device: leave torchrun out, or pass --device cpu")
    return default_device()


def _use_cuda(asked: str | None) -> None:
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        raise UserError(f"--device {asked} is not there; choose {_choices()}")
    number = ranks.local_rank()
    if _asked is not None and _asked.index is not None:
        if ranks.under_torchrun():
            raise UserError(
                f"--device {asked} is one GPU, torchrun gives each process its own: leave torchrun "
                "out, or pass --device cuda"
            )
        number = _asked.index
        if number >= count:
            raise UserError(f"--device {asked} is not there; choose {_choices()}")
    if number is not None:
        if number >= count:
            raise UserError(
                f"process {number} of torchrun on this host has no GPU of its own, there are "
                f"{count}: start fewer processes, or pass --device cpu"
            )
        torch.cuda.set_device(number)


def _choices() -> str:
    """The devices of this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{n}" for n in range(gpus))]
    return ", ".join([*names, *(["mps"] if torch.backends.mps.is_available() else [])])


def default_device() -> torch.device:
    """The device that `use_device` chose; before that this process's CUDA device where there is
    one, else the CPU.
    """
    kind = _asked.type if _asked is not None else None
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Wait until `device` has computed what it was given, as a CPU always has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by tensors on a CUDA device, else by this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def beside(device: torch.device) -> AbstractContextManager[object]:
    """Within the block, copy from `device` without waiting for what other threads have given it."""
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))
    return nullcontext()


def use_precision(asked: str | None, device: torch.device) -> str:
    """Set what float32 products on CUDA run in, for the whole process; the precision's name.

    Without `asked` it is that of the field: tf32 on CUDA, fp32 elsewhere. UserError where `device`
    has no such arithmetic.
    """
    precision = asked or ("tf32" if device.type == "cuda" else "fp32")
    if not _is_there(precision, device):
        others = [name for name in PRECISIONS if _is_there(name, device)]
        raise UserError(
            f"--precision {precision}: this {device.type.upper()} has none; "
            f"choose {', '.join(others)}"
        )
    allowed = precision in ("tf32", "bf16")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    return precision


def _is_there(precision: str, device: torch.device) -> bool:
    if precision == "tf32":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bf16" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return precision == "fp32" or (
            precision == "bf16" and torch.backends.mps.is_macos_or_newer(14, 0)
        )
    if precision == "bf16":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def storage_dtype(precision: str | None) -> torch.dtype:
    """Of images and parameters."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(precision: str | None) -> torch.dtype | None:
    """What networks cast images and parameters to; None leaves them."""
    return torch.bfloat16 if precision == "bf16" else None
