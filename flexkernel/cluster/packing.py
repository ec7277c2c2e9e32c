"""A user's function as bytes that engines can run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flexkernel.errors import ClusterError

__all__ = ["pack"]

# the most that travels with a user's function: every engine gets a copy of its own
PACKED_BYTES = 2 << 30


def pack(function: Callable) -> bytes:
    """A user's function as it travels to engines: with its code, so that one typed into a notebook
    works."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor | np.ndarray):
                file.need(obj.nbytes)  # before it is copied
            return super().reducer_override(obj)

    file = Bounded(PACKED_BYTES)
    try:
        Pickler(file).dump(function)
        return file.getvalue()
    except Exception as error:
        name = getattr(function, "__name__", function)
        raise ClusterError(
            f"{name} cannot be sent to engines, it holds something that stays here: {error}"
        ) from None


class Bounded(io.BytesIO):
    """Bytes up to a limit."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def need(self, num_bytes: int) -> None:
        if self.tell() + num_bytes > self._most:
            raise ValueError(
                f"it would be {self.tell() + num_bytes:,} bytes for each engine, and at most {self._most:,} travel; "
                "read it there from a file, or patch it in as a capture"
            )

    def write(self, data: Any) -> int:
        self.need(memoryview(data).nbytes)
        return super().write(data)
