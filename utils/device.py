"""Where the work runs."""

import torch


def default_device() -> torch.device:
    """This process's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
