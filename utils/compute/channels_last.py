"""Networks as a GPU runs them fastest: channels lie innermost, and so do all derivatives.

Tensor cores convolve with channels innermost (NHWC). torch.compile alone brings forward
convolutions into that order but leaves their derivatives in the other, with copies between. Written
into the network, the order holds for derivatives of any degree. Group norm's derivatives go back to
the other order, so instance norm is spelled out. In real arithmetic the function is the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def with_channels_last(network: nn.Module) -> nn.Module:
    """Let convolutions and instance norms of `network` keep channels innermost; its parameters
    stay as they are. A network with a norm over several channels is left alone.
    """
    modules = list(network.modules())
    norms = [module for module in modules if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    if not all(isinstance(norm, nn.GroupNorm) and _is_instance_norm(norm) for norm in norms):
        return network
    for module in modules:
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = _ChannelsLastConv2d
        elif isinstance(module, nn.GroupNorm):
            module.__class__ = _InstanceNorm
    return network


def _is_instance_norm(norm: nn.GroupNorm) -> bool:
    return norm.affine and norm.num_groups == norm.num_channels


def _channels_last(tensor: Tensor) -> Tensor:
    """As contiguous(memory_format=torch.channels_last), which torch.func.vmap does not know."""
    return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class _ChannelsLastConv2d(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(
            _channels_last(images),
            _channels_last(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class _InstanceNorm(nn.GroupNorm):
    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            return super().forward(images)
        centred = images - images.mean((2, 3), keepdim=True)
        scale = torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + self.eps)
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]
