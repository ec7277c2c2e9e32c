"""Tensors as plain bytes, and back."""

from __future__ import annotations

import torch

from flexkernel.wire import Blob, dtype_name

__all__ = ["as_bytes", "from_blob", "to_blob"]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory: (num_bytes,) uint8 on its device. A copy only if it is not contiguous.

    It shares memory with a contiguous tensor, so that it can also be received into."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def to_blob(tensor: torch.Tensor) -> Blob:
    """A tensor's shape, dtype and bytes as plain data to send. tensor: any shape, dtype and
    device; it should be small.

    >>> from_blob(to_blob(torch.arange(3)))
    tensor([0, 1, 2])
    """
    data = as_bytes(tensor.cpu()).numpy().tobytes()
    return Blob(tuple(tensor.shape), dtype_name(tensor.dtype), data)


def from_blob(blob: Blob) -> torch.Tensor:
    """The blob's tensor on the CPU, of its shape and dtype, in memory of its own."""
    dtype = getattr(torch, blob.dtype)
    if not blob.data:
        return torch.empty(blob.shape, dtype=dtype)
    return torch.frombuffer(bytearray(blob.data), dtype=dtype).view(blob.shape)
