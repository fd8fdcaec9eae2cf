"""Back-patch masking: which patches of an image show the object, told from a vision transformer's attention.

Source: Lee et al., "UniFormaly: Towards Task-Agnostic Unified Framework for Visual Anomaly Detection",
arXiv 2307.12540.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unianom import host
from unianom.errors import DataError, OptionError

Scope = Literal["image", "batch"]


def smooth_attention(attention: Tensor, kernel: int = 7) -> Tensor:
    """Average pool of stride 1 with zeros around the map, which count in the mean, so borders are damped (eq. 1).

    Args:
        attention: attention of the CLS token to the patches, averaged over heads, shape (B, h, w).
        kernel: side of the square window in patches, odd; 1 leaves the map as it is.

    Returns:
        shape (B, h, w), float32.

    Raises:
        OptionError: `kernel` is not a positive odd number.
        DataError: the map has another shape or, on the CPU, holds NaN, infinity or negative values.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise OptionError(f"the smoothing kernel of back-patch masking must be a positive odd number, got {kernel}")
    if attention.ndim != 3:
        raise DataError(f"an attention map must have shape (images, height, width), got {tuple(attention.shape)}")
    attention = attention.float()
    if host.reads_at_once(attention) and not _is_usable(attention).all():
        raise DataError("an attention map holds NaN, infinite or negative values; check the backbone and its weights")
    pooled = F.avg_pool2d(attention[:, None], kernel, stride=1, padding=kernel // 2)  # B 1 h w
    return pooled[:, 0]  # B h w


def _is_usable(attention: Tensor) -> Tensor:
    """Tell of each image whether its attention map holds finite values of at least zero; B h w to B."""
    return (attention.isfinite() & (attention >= 0)).flatten(1).all(1)


def soft_mask(attention: Tensor, kernel: int = 7, scope: Scope = "image") -> Tensor:
    """Return smoothed attention as a share of its maximum: factors of 0..1 for the patches ("soft masking").

    Args:
        attention: shape (B, h, w), see `smooth_attention`.
        kernel: side of the smoothing window; 1 takes the attention as it comes.
        scope: whose maximum divides: "image" the image's own; "batch" the largest of the batch, as the released code
            does, which lets the mask of an image depend on the others.

    Returns:
        shape (B, h, w), float32. Where the CPU would raise a DataError, other devices, whose values the host would have
        to wait for, give NaN for the whole image.

    Raises:
        OptionError: `kernel` or `scope` is not a valid one.
        DataError: see `smooth_attention`, or an attention map is zero everywhere.
    """
    smooth = smooth_attention(attention, kernel)
    if scope == "image":
        largest = smooth.amax(dim=(1, 2), keepdim=True)  # B 1 1
    elif scope == "batch":
        largest = smooth.max()
    else:
        raise OptionError(f"the scope of back-patch masking must be 'image' or 'batch', got '{scope}'")
    if not host.reads_at_once(attention):
        usable = _is_usable(attention)[:, None, None] & (largest > 0)  # B 1 1
        return torch.where(usable, smooth / largest, torch.nan)
    if not (largest > 0).all():
        raise DataError("an attention map is zero everywhere, so no patch can be told from the background")
    return smooth / largest


def back_patch_mask(attention: Tensor, kernel: int = 7, threshold: float = 0.1, scope: Scope = "image") -> Tensor:
    """Return which patches show the object: those with smoothed attention above a share of its maximum.

    Args:
        attention: shape (B, h, w), see `smooth_attention`.
        kernel: side of the smoothing window.
        threshold: share of the maximum, 0 <= threshold < 1.
        scope: see `soft_mask`.

    Returns:
        shape (B, h, w), bool, True for patches to keep; of an image whose soft mask is NaN all are.

    Raises:
        OptionError: an option is not a valid one.
        DataError: see `soft_mask`.
    """
    if not 0 <= threshold < 1:
        raise OptionError(f"the threshold of back-patch masking must be in [0, 1), got {threshold}")
    return ~(soft_mask(attention, kernel, scope) <= threshold)
