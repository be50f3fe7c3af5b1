"""Where networks compute, and in what precision; parameters and images stay as they are.

fp32  products and sums in float32
tf32  products of matrices and convolutions with 10 bits of mantissa, as the field's run on CUDA
bf16  the network in bfloat16, 7 bits of mantissa; loss and parameters in float32
fp64  everything in float64, for proofs
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from utils.core.errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16", "fp64")


def default_device() -> torch.device:
    """This process's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Wait until `device` has computed what it was given, as a CPU always has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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
    if precision == "bf16":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def storage_dtype(precision: str | None) -> torch.dtype:
    """Of images and parameters."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(precision: str | None) -> torch.dtype | None:
    """What networks cast images and parameters to; None leaves them."""
    return torch.bfloat16 if precision == "bf16" else None
