"""The scan: the unsharded model runs on the meta device, and each value's shape becomes a formula
in the batch size B, the sequence length S and the past P.

It takes no memory and a second or two. With it placement compares shapes instead of guessing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flexkernel.wire import ShapeFormula, dtype_name

from . import attention
from .caller import Caller
from .pytree import inputs, leaves

__all__ = ["Scan", "runnable_on_meta", "scan", "unsharded"]

Scan = dict[tuple[str, str], tuple[tuple[ShapeFormula, ...], ...]]
WINDOW = 8  # every sliding window's size during the scan, small enough to take effect
# (B, S, past). Two sizes could fit a wrong formula by chance. The step with a past tells S from
# past + S
SIZES = ((2, 11, 0), (3, 17, 0), (5, 13, 0), (2, 1, 19))
TERMS = {
    "B": lambda B, S, P: B,
    "S": lambda B, S, P: S,
    "B*S": lambda B, S, P: B * S,
    "P+S": lambda B, S, P: P + S,
    "P": lambda B, S, P: P,
    "W+S": lambda B, S, P: min(P, WINDOW - 1) + S,
}


def unsharded(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The whole model on the meta device, with the implementations that run there."""
    config = copy.deepcopy(config)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    extra = {"experts_implementation": "batched_mm"} if has_experts(config) else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=dtype, **extra
        ).eval()


def runnable_on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A user's reference model, switched to implementations that run on the meta device if it has
    them."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    config: Any = getattr(model, "config", None)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    return model


def has_experts(config: Any) -> bool:
    """Whether the config describes a mixture of experts."""
    return any(
        getattr(config, name, None)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )


def scan(model: torch.nn.Module, forward: bytes | None = None) -> Scan:
    """(module or virtual point, "output" | "input") → for each call in a forward, a formula for
    each tensor leaf.

    forward: the user's own function that calls the model, as code."""
    call = Caller(model, forward)
    cached = call.caches and not getattr(model, "_is_stateful", False)
    sizes = [size for size in SIZES if cached or not size[2]]
    runs = [observe(call, *size) for size in sizes]
    found: Scan = {}
    for where, calls in runs[0].items():
        found[where] = tuple(
            tuple(
                ShapeFormula(
                    path, formula(where[0], shapes_of(runs, where, call, path), sizes), dtype
                )
                for path, (_, dtype) in values.items()
            )
            for call, values in enumerate(calls)
        )
    return found


Observed = dict[tuple[str, str], list[dict[str, tuple[tuple[int, ...], str]]]]


def observe(call: Caller, B: int, S: int, past: int) -> Observed:
    """Run one forward on the meta device and note what entered and left every module, at each
    call."""
    seen: Observed = {}
    ids = lambda n: torch.ones(B, n, dtype=torch.long, device="meta")  # noqa: E731
    position = lambda a, n: torch.arange(a, a + n, device="meta").expand(B, n)  # noqa: E731

    def batch(a: int, n: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": ids(n),
            "attention_mask": ids(a + n),
            "position_ids": position(a, n),
        }

    cache = {"past_key_values": DynamicCache(config=call.model.config)} if past else {}
    with torch.no_grad():
        if past:
            call(batch(0, past), use_cache=True, **cache)
        with watching(call.model, seen):
            call(batch(past, S), use_cache=bool(past), **cache)
    return seen


class watching:
    """While entered, notes every value of every module and virtual point."""

    def __init__(self, model: torch.nn.Module, seen: Observed):
        self.model = model
        self.seen = seen
        self.handles: list[Any] = []

    def note(self, name: str, at: str, value: Any) -> None:
        """Note the shapes and dtypes of a value's tensors."""
        shapes = {path: (tuple(t.shape), dtype_name(t.dtype)) for path, t in leaves(value)}
        self.seen.setdefault((name, at), []).append(shapes)

    def note_point(self, name: str, value: Callable[[], torch.Tensor]) -> None:
        """A virtual point's value, of any shape, on the meta device."""
        self.note(name, "output", value())

    def __enter__(self) -> None:
        attention.install()
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: self.note(
                        name, "input", inputs(args, kwargs)
                    ),
                    with_kwargs=True,
                ),
                module.register_forward_hook(
                    lambda _m, args, kwargs, out, name=name: self.note(name, "output", out),
                    with_kwargs=True,
                ),
            ]
            for point in attention.POINTS:
                attention.tap(module, point, functools.partial(self.note_point, f"{name}.@{point}"))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.model.modules():
            for point in attention.POINTS:
                attention.untap(module, point)


def shapes_of(
    runs: Sequence[Observed], where: tuple[str, str], call: int, path: str
) -> list[tuple[int, ...] | None]:
    """The shapes of one leaf in each run; None for a run without it."""
    found = []
    for run in runs:
        calls = run.get(where, [])
        found.append(calls[call][path][0] if call < len(calls) and path in calls[call] else None)
    return found


def formula(
    name: str, shapes: Sequence[tuple[int, ...] | None], sizes: Sequence[tuple[int, int, int]]
) -> tuple[tuple[int, str], ...] | None:
    """The dims as terms in B, S and P; None if no formula fits, or if the data decides the order
    of the rows.

    Rows inside a mixture's experts are sorted by expert. Their shape may fit a formula, but their
    order does not."""
    known = [(shape, size) for shape, size in zip(shapes, sizes, strict=True) if shape is not None]
    if (
        len(known) < 2
        or len({len(shape) for shape, _ in known}) > 1
        or "experts" in name.split(".")[:-1]
    ):
        return None
    dims = [
        dim_of([shape[d] for shape, _ in known], [size for _, size in known])
        for d in range(len(known[0][0]))
    ]
    if any(dim is None or (dim[1] == "B*S" and dim[0] > 1) for dim in dims):
        return None
    return tuple(dim for dim in dims if dim is not None)


def dim_of(values: Sequence[int], sizes: Sequence[tuple[int, int, int]]) -> tuple[int, str] | None:
    """(factor, term) of one dim; None if no term fits.

    >>> dim_of([22, 33, 22], [(2, 11, 0), (3, 17, 0), (2, 1, 19)])
    (11, 'B')
    """
    if len(set(values)) == 1:
        return values[0], ""
    for term, function in TERMS.items():
        of_term = [function(*size) for size in sizes]
        if all(of_term) and values[0] % of_term[0] == 0:
            factor = values[0] // of_term[0]
            if factor and all(
                value == factor * t for value, t in zip(values, of_term, strict=True)
            ):
                return factor, term
    return None


def read_config(path: str) -> Any:
    """The model's config, from a folder or hub id; no code from the repository runs."""
    return AutoConfig.from_pretrained(path, trust_remote_code=False)
