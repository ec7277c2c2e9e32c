"""A user's function as bytes that engines can run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import torch

from flexkernel.errors import ClusterError

__all__ = ["pack"]

# The most that travels with a user's function. Every engine gets a copy of its own.
PACKED_BYTES = 2 << 30


def pack(function: Callable) -> bytes:
    """A function as it travels to engines: with its code, so that one of a notebook's cell works.

    ClusterError: it holds something that cannot be sent, or more than 2 GiB."""
    file = BoundedBytes(PACKED_BYTES)
    try:
        FunctionPickler(file).dump(function)
        return file.getvalue()
    except Exception as error:
        name = getattr(function, "__name__", function)
        raise ClusterError(
            f"{name} cannot be sent to engines, it holds something that stays here: {error}"
        ) from None


class BoundedBytes(io.BytesIO):
    """A file in memory up to a limit. ValueError: more would be written."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit = limit

    def check_room(self, num_bytes: int) -> None:
        needed = self.tell() + num_bytes
        if needed > self._limit:
            raise ValueError(
                f"it would be {needed:,} bytes for each engine, and at most {self._limit:,} "
                "travel; read it there from a file, or patch it in as a capture"
            )

    def write(self, data: Any) -> int:
        self.check_room(memoryview(data).nbytes)
        return super().write(data)


class FunctionPickler(cloudpickle.Pickler):
    """Refuses an array that is too large before it is copied."""

    def __init__(self, file: BoundedBytes):
        super().__init__(file)
        self._bounded = file

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor | np.ndarray):
            self._bounded.check_room(obj.nbytes)
        return super().reducer_override(obj)
