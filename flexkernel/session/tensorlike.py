"""What behaves like a tensor: arithmetic, comparisons, torch's functions and a tensor's methods, of
whatever has a tensor()."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["TensorLike"]

BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
UNARY = ("neg", "pos", "abs", "invert")


class TensorLike:
    """Behaves like the tensor that its tensor() returns, on the CPU. Each result is a plain tensor.

    Arithmetic, comparisons (elementwise, as torch's) and functions of torch read all of it. So do
    the methods of a tensor that are not defined here, but for those that change it in place."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """All of it, of shape self.shape and dtype self.dtype, on the CPU."""
        raise NotImplementedError

    # --- without reading it -----------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape as torch.Size, or the size of one dim."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    # --- all of it --------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = {name: plain(value) for name, value in (kwargs or {}).items()}
        return function(*plain(args), **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy and what draws with it. bfloat16, which numpy has not, comes as float32."""
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def numpy(self) -> np.ndarray:
        """As a numpy array; bfloat16, which numpy has not, as float32."""
        whole = self.tensor()
        return (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()

    def detach(self) -> torch.Tensor:
        """All of it, of shape self.shape, on the CPU; there is no graph to detach it from."""
        return self.tensor()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensor())

    def __bool__(self) -> bool:
        return bool(self.tensor())

    def __float__(self) -> float:
        return float(self.tensor())

    def __int__(self) -> int:
        return int(self.tensor())

    __hash__ = object.__hash__  # == is elementwise, so a dict or a set tells captures by identity

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("_") or name.endswith("_") or not callable(method):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return lambda *args, **options: method(self.tensor(), *plain(args), **options)


def plain(value: Any) -> Any:
    """Captures, also those within lists and tuples, as tensors."""
    if isinstance(value, TensorLike):
        return value.tensor()
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


def forward(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: TensorLike, *others: Any) -> Any:
        return function(self.tensor(), *map(plain, others))

    return method


def reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: TensorLike, other: Any) -> Any:
        return function(plain(other), self.tensor())

    return method


for name in (*BINARY, *COMPARISONS, *UNARY):
    setattr(TensorLike, f"__{name.strip('_')}__", forward(getattr(operator, name)))
for name in BINARY:
    setattr(TensorLike, f"__r{name.strip('_')}__", reflected(getattr(operator, name)))
