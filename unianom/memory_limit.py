"""A bound on what building a network may allocate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from unianom.errors import OptionError

_FACTORIES = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange)
) | {torch.eye, torch.linspace, torch.randperm, torch.empty_strided}

MOST_TENSORS = 100_000
"""Tensors that may be made while a network is built, of which the largest of timm have some thousands; one of a
billion layers would be built for days before it filled memory."""


class _Counting(TorchFunctionMode):
    """Adds up the sizes of tensors before they are made."""

    def __init__(self, most: int, tensors: int, what: str) -> None:
        super().__init__()
        self._most, self._most_tensors, self._what = most, tensors, what
        self._bytes = self._tensors = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            shape_only = {key: value for key, value in kwargs.items() if key not in ("generator", "out", "pin_memory")}
            self._tensors += 1
            self._bytes += func(*args, **{**shape_only, "device": "meta"}).nbytes
            if self._bytes > self._most or self._tensors > self._most_tensors:
                raise OptionError(
                    f"{self._what} would need more than {self._most / 1e9:.1f} GB or {self._most_tensors:,} tensors; "
                    f"lower its sizes"
                )
        return func(*args, **kwargs)


@contextmanager
def memory_limit(what: str, most: int | None = None, tensors: int = MOST_TENSORS) -> Iterator[None]:
    """Refuse to make tensors beyond a limit, before they are made, while networks are built in the block.

    Args:
        what: is built, for the message.
        most: bytes in all; None for the memory of this machine.
        tensors: made while it is built, those that initialise others counted.

    Raises:
        OptionError: the limit is reached; nothing of the tensor that would exceed it was allocated.
    """
    with _Counting(most or _machine_memory(), tensors, what):
        yield


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
