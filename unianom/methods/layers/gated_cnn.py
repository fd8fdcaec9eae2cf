"""The multi-granularity CNN of UniAS."""

from __future__ import annotations

from torch import Tensor, nn


class MultiGranularityCnn(nn.Module):
    """Sum of four branches that see 1×1, 3×3, 5×5 and 7×7 cells (UniAS, eq. 5): one 1×1 convolution, and one, two and
    three 3×3 convolutions in a row.

    The exponent of eq. 5 runs from 0 to 2; the text and Figure 3 stack one to three convolutions, as done here.

    Args:
        channels: of the input.
        dim: of the output.
        gated: a GELU at the end of each branch (MGG-CNN), or none (MG-CNN, an ablation).
    """

    def __init__(self, channels: int, dim: int, gated: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(channels, dim, kernel_size=1)])
        for depth in (1, 2, 3):
            widths = [channels] + [dim] * depth
            self.branches.append(
                nn.Sequential(*(nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1) for i in range(depth)))
            )
        self.gate = nn.GELU() if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """B×channels×h×w to B×dim×h×w."""
        first, *others = (self.gate(branch(x)) for branch in self.branches)
        return sum(others, start=first)
