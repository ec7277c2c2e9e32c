"""What every module of the unsharded model takes and returns, by plain torch hooks. Does not
import flexkernel.

The tests compare captures with this, so it shares no code with what it judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Gradients", "Reference", "gradients", "leaves", "load", "reference"]

Key = tuple[str, int, str]  # module name, call index, path of the tensor inside the value


@dataclasses.dataclass
class Reference:
    """outputs, inputs: (module name, call index, leaf path) -> a clone. A value's own tensor has
    the path ""."""

    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    outputs: dict[Key, torch.Tensor]
    inputs: dict[Key, torch.Tensor]

    @functools.cached_property
    def attention(self) -> dict[tuple[str, str], torch.Tensor]:
        """(attention module, q|k|v|pattern|z) -> tensor; q, k after rotary. Pattern rows of pads
        mean nothing.

        Leaves the capturing hooks of transformers' output_attentions on the model; they change no
        value.
        """
        return {**_patterns(self), **_keys_and_values(self), **_queries(self), **_mixed(self)}


@dataclasses.dataclass
class Gradients:
    """loss: its value. outputs, inputs: (module, leaf path) -> the gradient of that tensor, for
    modules that fire once. parameters: by every name. attention: (attention module,
    q|k|v|pattern|z) -> gradient."""

    loss: float
    outputs: dict[tuple[str, str], torch.Tensor]
    inputs: dict[tuple[str, str], torch.Tensor]
    parameters: dict[str, torch.Tensor | None]
    attention: dict[tuple[str, str], torch.Tensor]


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor], loss) -> Gradients:
    """One backward of the unsharded model from loss(logits); edits are the caller's own hooks,
    already there.

    Outputs by torch's full backward hooks, inputs by copies that stand in for them: what reaches a
    copy came through that module alone."""
    found = Gradients(0.0, {}, {}, {}, {})
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_full_backward_pre_hook(_keep_output(found.outputs, name)))
        handles.append(
            module.register_forward_pre_hook(
                _copy_inputs(found.inputs, name), with_kwargs=True, prepend=True
            )
        )
    model.requires_grad_(True)
    with warnings.catch_warnings(), _watching_attention(model, found.attention):
        warnings.simplefilter("ignore")  # of outputs that are no tensors: those are left out
        value = loss(model(**batch, use_cache=False).logits)
        value.backward()
    for handle in handles:
        handle.remove()
    for name, module in _attention_modules(model) if found.attention else ():
        by_head = (-1, module.head_dim)
        found.attention[name, "v"] = (
            found.outputs[f"{name}.v_proj", ""].unflatten(-1, by_head).transpose(1, 2)
        )
        found.attention[name, "z"] = found.inputs[f"{name}.o_proj", "0"].unflatten(-1, by_head)
    found.loss = value.item()
    found.parameters = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return found


def _keep_output(found: dict, name: str):
    def hook(_module, given) -> None:
        whole = [(str(i) if len(given) > 1 else "", g) for i, g in enumerate(given)]
        found.update({(name, path): g.detach().clone() for path, g in whole if g is not None})

    return hook


def _copy_inputs(found: dict, name: str):
    def copied(path: str, value: Any) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
            or not value.requires_grad
        ):
            return value
        copy = value.clone()
        copy.register_hook(lambda g: found.__setitem__((name, path), g.detach().clone()))
        return copy

    def hook(_module, args, kwargs):
        new = tuple(copied(str(i), arg) for i, arg in enumerate(args))
        return new, {key: copied(key, value) for key, value in kwargs.items()}

    return hook


@contextlib.contextmanager
def _watching_attention(model: torch.nn.Module, found: dict) -> Iterator[None]:
    """q and k where rotary has turned them, v where it is projected, z where it goes out; the
    pattern of eager."""
    layers = _attention_modules(model)
    if not layers or not hasattr(layers[0][1], "o_proj"):
        yield
        return
    source = sys.modules[type(layers[0][1]).__module__]
    rotary, softmax = source.apply_rotary_pos_emb, torch.nn.functional.softmax
    turned, mixed = iter(layers), iter(layers)
    eager = model.config._attn_implementation == "eager"

    def keep(name: str, point: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor.register_hook(lambda g: found.__setitem__((name, point), g.detach().clone()))
        return tensor

    def rotary_watched(q, k, *args, **kwargs):
        name, _ = next(turned)
        q, k = rotary(q, k, *args, **kwargs)
        return keep(name, "q", q), keep(name, "k", k)

    def softmax_watched(*args, **kwargs):
        return keep(next(mixed)[0], "pattern", softmax(*args, **kwargs))

    source.apply_rotary_pos_emb = rotary_watched
    torch.nn.functional.softmax = softmax_watched if eager else softmax
    try:
        yield
    finally:
        source.apply_rotary_pos_emb, torch.nn.functional.softmax = rotary, softmax


def load(
    folder: str | os.PathLike[str],
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    gguf: bool = False,
):
    """The unsharded model. gguf: read the folder's one .gguf file, dequantised."""
    from transformers import AutoModelForCausalLM

    extra = {"gguf_file": next(Path(folder).glob("*.gguf")).name} if gguf else {}
    # the default: sdpa where the architecture has it (Gemma-2 has not), else eager
    if attn != "sdpa":
        extra["attn_implementation"] = attn
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval()


def reference(
    folder_or_model: str | os.PathLike[str] | torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    gguf: bool = False,
) -> Reference:
    """One forward of the unsharded model, all modules hooked. A model passed in keeps its own attn
    and dtype."""
    given = isinstance(folder_or_model, torch.nn.Module)
    model = (
        folder_or_model.eval()
        if given
        else load(folder_or_model, attn=attn, dtype=dtype, gguf=gguf)
    )
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    outputs, inputs = record(model, batch)
    return Reference(model, batch, outputs, inputs)


def record(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """Outputs and inputs of every module in one forward without cache. Inputs are cloned before
    the module runs."""
    outputs: dict[Key, torch.Tensor] = {}
    inputs: dict[Key, torch.Tensor] = {}
    started: Counter[str] = Counter()
    ended: Counter[str] = Counter()

    def before(name: str, args: tuple, kwargs: dict) -> None:
        value = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        inputs.update(
            {(name, started[name], path): leaf.detach().clone() for path, leaf in leaves(value)}
        )
        started[name] += 1

    def after(name: str, value: Any) -> None:
        outputs.update(
            {(name, ended[name], path): leaf.detach().clone() for path, leaf in leaves(value)}
        )
        ended[name] += 1

    handles = []
    for name, module in model.named_modules():
        pre, post = _forget_result(before, name), _forget_result(after, name)
        handles.append(
            module.register_forward_pre_hook(lambda _, a, k, pre=pre: pre(a, k), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda _, a, out, post=post: post(out)))
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, inputs


def _forget_result(function, name: str):
    """A hook that returns something replaces the value: these return None."""

    def hook(*args) -> None:
        function(name, *args)

    return hook


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of each tensor in nested tuples, lists, mappings (ModelOutput is one) and
    dataclasses."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, tuple | list):
        children = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        return
    for key, child in children:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


# Attention's inside, by means other than AttentionInterface: B batch, H heads, S positions, D per
# head


def _attention_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [
        (n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("self_attn", "attn")
    ]


def _patterns(ref: Reference) -> dict[tuple[str, str], torch.Tensor]:
    """(B, H, S, S) from output_attentions, which only eager has."""
    own = ref.model.config._attn_implementation
    ref.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = ref.model(**ref.batch, use_cache=False, output_attentions=True).attentions
    finally:
        ref.model.set_attn_implementation(own)
    return {
        (n, "pattern"): p.clone()
        for (n, _), p in zip(_attention_modules(ref.model), found, strict=True)
    }


def _keys_and_values(ref: Reference) -> dict[tuple[str, str], torch.Tensor]:
    """(B, KV heads, S, D) as the cache keeps them. A cache made without the config forgets no
    window."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        ref.model(**ref.batch, use_cache=True, past_key_values=cache)
    found = {}
    for (name, _), layer in zip(_attention_modules(ref.model), cache.layers, strict=True):
        found[name, "k"], found[name, "v"] = layer.keys.clone(), layer.values.clone()
    return found


def _queries(ref: Reference) -> dict[tuple[str, str], torch.Tensor]:
    """(B, H, S, D): q_proj (normed where the model does) turned by the modeling file's own rotary
    function."""
    found = {}
    for name, module in _attention_modules(ref.model):
        if hasattr(module, "c_attn"):  # GPT-2: one projection, q first, no rotary
            flat = ref.outputs[f"{name}.c_attn", 0, ""].split(module.split_size, dim=-1)[0]
            found[name, "q"] = flat.unflatten(-1, (-1, module.head_dim)).transpose(1, 2).clone()
            continue
        projected = ref.outputs[f"{name}.q_proj", 0, ""].unflatten(-1, (-1, module.head_dim))
        heads = ref.outputs.get((f"{name}.q_norm", 0, ""), projected).transpose(1, 2)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        cos, sin = (ref.inputs[name, 0, f"position_embeddings.{i}"] for i in range(2))
        found[name, "q"] = rotate(heads, heads, cos, sin)[0].clone()
    return found


def _mixed(ref: Reference) -> dict[tuple[str, str], torch.Tensor]:
    """(B, S, H, D): what the output projection takes."""
    found = {}
    for name, module in _attention_modules(ref.model):
        last = "c_proj" if hasattr(module, "c_proj") else "o_proj"
        found[name, "z"] = (
            ref.inputs[f"{name}.{last}", 0, "0"].unflatten(-1, (-1, module.head_dim)).clone()
        )
    return found
