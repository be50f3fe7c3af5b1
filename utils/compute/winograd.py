"""3x3 convolutions with 2.25 times fewer products: Winograd's F(2x2, 3x3) (Lavin & Gray, 2016).

A tile of 2x2 outputs depends on 4x4 inputs; transformed by small matrices of 0, 1 and 1/2,

    Y = A^T [ (G g G^T) * (B^T d B) ] A

its 36 products become 16, each a sum over channels, so that a convolution is 16 matrix products.
Exact in real arithmetic. Written in plain tensor operations, so that derivatives of any order
follow; the transforms are only fast where a compiler fuses them. On a CPU, where convolutions are
bound by arithmetic, it wins (docs/performance.md); CUDA's own convolutions use tensor cores.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below it the transforms cost more than the products that they save.
MIN_CHANNELS = 16


def with_winograd(network: nn.Module) -> nn.Module:
    """Let the 3x3 convolutions of `network` with stride 1 and padding 1 run by Winograd's scheme,
    wherever their inputs have even sides; parameters stay as they are.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_suitable(module):
            module.__class__ = _WinogradConv2d
    return network


def _is_suitable(conv: nn.Conv2d) -> bool:
    plain = (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
    is_3x3 = conv.kernel_size == (3, 3) and conv.padding == (1, 1)
    zeros = conv.padding_mode == "zeros"
    return plain and is_3x3 and zeros and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS


class _WinogradConv2d(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % 2 or images.shape[3] % 2:
            return super().forward(images)
        result = winograd_conv2d(images, self.weight)
        return result if self.bias is None else result + self.bias[:, None, None]


def winograd_conv2d(images: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(images, weight, padding=1): (N, C, H, W), (K, C, 3, 3) -> (N, K, H, W).

    H and W are even.
    """
    n, c, height, width = images.shape
    k = len(weight)
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    tiles = _to_tiles(_to_tiles(padded, 1), 3)  # (4, 4, N, H/2, W/2, C)
    kernel = _to_kernel(_to_kernel(weight.permute(2, 3, 1, 0), 0), 1)  # (4, 4, C, K)
    products = torch.bmm(tiles.reshape(16, -1, c), kernel.reshape(16, c, k))
    columns = _to_outputs(products.view(4, 4, n, height // 2, width // 2, k))
    by_row = zip(*(_to_outputs(column) for column in columns), strict=True)  # (N, H/2, W/2, K) each
    pixels = torch.stack([torch.stack(row, 3) for row in by_row], 2)
    return pixels.reshape(n, height, width, k).permute(0, 3, 1, 2).contiguous()


def _to_tiles(x: Tensor, dim: int) -> Tensor:
    """B^T d along `dim`, whose 2t + 2 entries become (4, ..., t, ...): overlapping tiles of 4."""
    count = x.shape[dim] // 2 - 1
    even, odd = x.unflatten(dim, (count + 1, 2)).unbind(dim + 1)
    d0, d2 = even.narrow(dim, 0, count), even.narrow(dim, 1, count)
    d1, d3 = odd.narrow(dim, 0, count), odd.narrow(dim, 1, count)
    return torch.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3])


def _to_kernel(g: Tensor, dim: int) -> Tensor:
    """G g along `dim`, whose 3 entries become a leading 4."""
    g0, g1, g2 = g.unbind(dim)
    return torch.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2])


def _to_outputs(m: Tensor) -> tuple[Tensor, Tensor]:
    """A^T m along the leading 4: the two outputs of a tile."""
    m0, m1, m2, m3 = m.unbind(0)
    return m0 + m1 + m2, m1 - m2 - m3
