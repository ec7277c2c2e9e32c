"""Every private or fragile API of torch and transformers that we use. Each is wrapped once and
pinned by a test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Placement, Shard, _redistribute
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AttentionInterface, DynamicCache
from transformers.distributed import DistributedConfig, mixin
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.distributed.utils import initialize_distributed_mesh

from flexkernel.wire import Layout

__all__ = [
    "StageCache",
    "abort_groups",
    "abort_nccl",
    "all_gather_single",
    "alone",
    "as_written",
    "attention_functions",
    "distributed_config",
    "eager_attention",
    "fill_buffers",
    "fix_cached_groups",
    "flat_local",
    "flat_shape",
    "forget_meshes",
    "in_fsdp1",
    "inner",
    "is_compiled",
    "is_placeholder",
    "is_split",
    "loading_under",
    "made_groups",
    "meshes_on",
    "own_modules",
    "rebuild_meshes",
    "refresh_groups",
    "remake_groups",
    "reset_forward",
    "reshard",
    "set_attention",
    "split_factor",
    "split_index",
    "stage_edges",
    "stage_peer",
    "sum_gradients",
    "tp_styles",
    "unflattened",
    "unwrapped",
    "waited",
    "without_gradient_sync",
]

# --- transformers: loading ------------------------------------------------------------


def distributed_config(layout: Layout) -> DistributedConfig:
    """transformers' config of a layout.

    Its check refuses pp together with fsdp or dp. Both work, with results equal to the unsharded
    model's (tests/layouts/test_parity.py). So pp is set after the check of the other degrees."""
    config = DistributedConfig(
        tp_size=layout.tp, fsdp_size=layout.fsdp, dp_replicate_size=layout.dp
    )
    config.pp_size = layout.pp
    return config


def is_placeholder(module: torch.nn.Module) -> bool:
    """Whether the module stands in for a module of another pipeline stage."""
    return isinstance(module, PipelineIdentityLayer)


@contextlib.contextmanager
def loading_under(layout: Layout) -> Iterator[None]:
    """Inside the context, transformers' plans cover only this stage while a model loads.

    transformers 5.23 resolves a plan for all layers before it replaces those that are absent from
    the stage (KeyError)."""
    if layout.pp == 1:
        yield
        return
    names = ("apply_tensor_parallelism", "apply_fully_sharded_data_parallelism")
    original = {name: getattr(mixin, name) for name in names if hasattr(mixin, name)}

    def on_this_stage(model: torch.nn.Module, plan: dict[str, str]) -> dict[str, str]:
        modules = {n: m for n, m in model.named_modules() if not is_placeholder(m)}
        parameters = dict(model.named_parameters())
        return {n: style for n, style in plan.items() if n in parameters or n in modules}

    def tensor_parallel(model, mesh, plan):
        return original["apply_tensor_parallelism"](model, mesh, on_this_stage(model, plan))

    def data_parallel(model, meshes, plan, ep_plan):
        plan = on_this_stage(model, plan)
        return original["apply_fully_sharded_data_parallelism"](model, meshes, plan, ep_plan)

    mixin.apply_tensor_parallelism = tensor_parallel
    mixin.apply_fully_sharded_data_parallelism = data_parallel
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(mixin, name, function)


@contextlib.contextmanager
def meshes_on(device: str) -> Iterator[None]:
    """Inside the context, transformers makes its meshes, and loads, on this kind of device.

    By itself it uses the machine's accelerator, whatever is asked for."""
    asked = torch._C._get_accelerator
    if asked().type == device:
        yield
        return
    torch._C._get_accelerator = lambda *_: torch.device(device)
    try:
        yield
    finally:
        torch._C._get_accelerator = asked


def tp_styles(model: torch.nn.Module, layout: Layout) -> dict[str, str]:
    """Module or parameter name → its tensor-parallel style in transformers' plan; empty without
    tp."""
    if layout.tp == 1 or not hasattr(model, "_resolve_parallel_plans"):
        return {}
    return dict(model._resolve_parallel_plans(DistributedConfig(tp_size=layout.tp))[0])


@contextlib.contextmanager
def stage_edges(model: torch.nn.Module, tape: Any) -> Iterator[None]:
    """Inside the context, the tape keeps what this pipeline stage sends and receives in a forward.

    These tensors are the ends of this rank's graph. The last stage returns its own logits, not the
    copy that it broadcasts."""
    stage: Any = getattr(model, "_pp_stage", None)
    if stage is None:
        yield
        return
    plain = stage.communicate
    from_last = stage.broadcast_from_last

    def communicate(
        operation: str, *, tensor: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor | None:
        """The stage's send or receive of a tensor, of any shape; it also keeps the tensor on the
        tape."""
        if tensor is not None:
            if not stage.pp_is_last_stage:
                tape.sent = tensor
            return plain(operation, tensor=tensor.detach(), **rest)
        got = plain(operation, **rest)
        if got is not None:
            got.requires_grad_()
        tape.received = got
        return got

    def broadcast_from_last(tensor: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        """The last stage's tensor, of any shape: there its own, elsewhere a copy.

        All ranks of the pipeline group must call."""
        if tensor is None:
            return from_last(None, **rest)
        from_last(tensor.detach(), **rest)
        return tensor

    stage.communicate = communicate
    stage.broadcast_from_last = broadcast_from_last
    try:
        yield
    finally:
        del stage.communicate, stage.broadcast_from_last


def stage_peer(model: torch.nn.Module, step: int) -> tuple[dist.ProcessGroup, int, bool]:
    """(this rank's pipeline group, the global rank `step` stages on, whether they send through the
    CPU's memory)."""
    stage: Any = model._pp_stage
    return (
        stage.pp_group,
        dist.get_global_rank(stage.pp_group, stage.pp_rank + step),
        stage.comm_on_cpu,
    )


def fill_buffers(model: Any, device: str) -> None:
    """Give a model that was built on meta its buffers, such as rotary frequencies, which no
    checkpoint has.

    As in from_pretrained, the model's own initialisation does it, but only for the modules that
    own buffers."""
    owners = set()
    for name, buffer in list(model.named_buffers()):
        path, _, short = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._buffers[short] = torch.empty_like(buffer, device=device)
        owners.add(owner)
    for module in model.modules():
        module._is_hf_initialized = module not in owners
    model.initialize_weights()


# --- transformers: attention ----------------------------------------------------------

_ORIGINAL_ATTENTION: dict[str, Callable] = dict(AttentionInterface())


def attention_functions() -> dict[str, Callable]:
    """transformers' own attention functions by name, as they were before ours replaced them."""
    return _ORIGINAL_ATTENTION


def set_attention(name: str, function: Callable) -> None:
    """Replace the attention function of that name. Under an existing name transformers makes the
    same masks."""
    AttentionInterface.register(name, function)


def eager_attention(module: torch.nn.Module) -> Callable:
    """The eager attention of the module's own modeling file. LookupError: it has none."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise LookupError(f"{type(module).__name__} has no eager_attention_forward")


# --- transformers: generation ---------------------------------------------------------


class StageCache(DynamicCache):
    """The key/value cache of one pipeline stage.

    transformers asks the model's first layer of each kind for the lengths that masks and positions
    need. On another stage that layer stays empty, and its answer 0 would give wrong tokens without
    an error. So a layer that this stage has answers instead."""

    def __init__(self, model: Any):
        config = model.config.get_text_config(decoder=True)
        super().__init__(config=config)
        stage = model._pp_stage
        self._owned = range(*stage.layer_range_for_rank(stage.pp_rank, config.num_hidden_layers))

    def _answers(self, layer: int) -> int:
        """The layer that answers for this one: itself if this stage has it, else the stage's first
        of its kind."""
        if layer in self._owned:
            return layer
        alike = [i for i in self._owned if self.is_sliding[i] == self.is_sliding[layer]]
        return (alike or self._owned)[0]  # a stage without that kind uses no such mask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._answers(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._answers(layer_idx))


# --- wrappers -------------------------------------------------------------------------

WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def own_modules(model: torch.nn.Module, twice: bool = False) -> dict[str, torch.nn.Module]:
    """The user's modules by the names that they have in the unsharded model.

    Wrappers of DDP, FSDP, compile and checkpointing are left out. twice: put a module with several
    names under each of them, else only under the first."""
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()

    def walk(module: torch.nn.Module, name: str) -> None:
        module = unwrapped(module)
        if id(module) in seen and not twice:
            return
        seen.add(id(module))
        found[name] = module
        for child_name, child in module._modules.items():
            if child is not None:
                walk(child, ".".join(filter(None, (name, child_name))))

    walk(model, "")
    return found


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside the wrappers of DDP, FSDP, compile and checkpointing."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
            continue
        inner = next(
            (module._modules[name] for name in WRAPPED if module._modules.get(name) is not None),
            None,
        )
        if inner is None:
            return module
        module = inner


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether torch.compile has compiled the model or one of its modules."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextlib.contextmanager
def as_written(compiled: bool) -> Iterator[None]:
    """Inside the context, compiled modules run uncompiled. compiled: whether there are any."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# --- torch ----------------------------------------------------------------------------


def inner(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor that holds this rank's part of a parameter, of its local shape.

    Use it to give a parameter other memory: a DTensor's to_local() is only a view of this tensor.
    """
    return getattr(parameter, "_local_tensor", parameter)


def waited(value: torch.Tensor) -> torch.Tensor:
    """The same value, of the same shape, dtype and device, once its collective has ended.

    Tensor parallelism returns tensors whose collective still runs."""
    if not isinstance(value, AsyncCollectiveTensor):
        return value
    if value.requires_grad:
        return _Waited.apply(value)
    return value.wait()


class _Waited(torch.autograd.Function):
    """Waits for a collective and keeps the autograd graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        """The value, of any shape, once its collective has ended."""
        return value.wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The same gradient, of the value's shape."""
        return gradient


def is_split(placement: Placement) -> bool:
    """Whether a placement gives each rank a part. A strided shard does; torch does not count it as
    a Shard."""
    return isinstance(placement, Shard | _StridedShard)


def split_factor(placement: Placement) -> int:
    """Into how many groups a strided shard first splits its dim; 1 for other placements.

    Each rank takes one piece of each group."""
    if isinstance(placement, _StridedShard):
        return int(placement.split_factor)
    return 1


def split_index(placement: Any, index: torch.Tensor, num_parts: int, part: int) -> torch.Tensor:
    """The part of an index that lies on rank `part` of `num_parts`, in the order in which it lies
    there.

    index: (n,) -> (m,), same dtype and device. The same function splits a DTensor's data."""
    along_it: Any = Shard(0)
    if split_factor(placement) > 1:
        along_it = type(placement)(0, split_factor=split_factor(placement))
    parts, _ = along_it._split_tensor(index, num_parts, with_padding=False, contiguous=False)
    return parts[part]


def all_gather_single(
    whole: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup | None = None
) -> dist.Work:
    """Start to gather every rank's equal part. All ranks of the group must call.

    mine: (n,); whole: (ranks * n,), same dtype and device, filled when the returned work ends.
    torch 2.13 warns of the only name that older versions have."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(whole, mine, group=group, async_op=True)


def abort_groups() -> None:
    """Drop every process group of this process, even broken or half-made ones, and count groups
    from 0 again."""
    if dist.is_initialized():
        c10d._abort_process_group()
    # the count differs between ranks after an init that failed on some: the next init would hang
    c10d._world.group_count = 0


def abort_nccl() -> None:
    """Abort the NCCL communicators of all groups of this process at once. Any thread may call it.

    One after another they could wait for each other. The groups stay until abort_groups() drops
    them. Whoever waits goes on with whatever the memory contains."""
    groups = sorted(
        c10d._world.pg_names, key=lambda group: c10d._world.pg_names[group], reverse=True
    )
    backends = [backend for backend in map(nccl_of, groups) if backend is not None]
    if backends:
        backends[0]._group_start()
        for backend in backends:
            backend.abort()
        backends[0]._group_end()


def nccl_of(group: dist.ProcessGroup) -> Any:
    """A group's backend between GPUs; None if that is not NCCL."""
    device_types = {device.type for device in group._device_types}
    if not dist.is_nccl_available() or "cuda" not in device_types:
        return None
    backend = group._get_backend(torch.device("cuda"))
    if not isinstance(backend, dist.ProcessGroupNCCL):
        return None
    return backend


def forget_meshes() -> None:
    """Empty DTensor's caches. They keep every mesh that had a DTensor, with its groups, threads
    and sockets."""
    # copied from torch.distributed.tensor.debug: importing that imports torch's compiler, which
    # takes each engine a second at its start
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


@contextlib.contextmanager
def alone(rank: int, world: int) -> Iterator[None]:
    """Inside the context, the process groups are fake: this rank keeps its number, and no other
    rank answers.

    Code that builds meshes or shards in them sends nothing and waits for nobody. Use it only for
    code that needs no result of a collective."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    abort_groups()
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        yield
    finally:
        abort_groups()


def made_groups() -> list[tuple[int, list[int]]]:
    """(number, ranks) of every group on any rank except the default one, in the order of their
    creation.

    All ranks must call."""
    names = c10d._world.pg_names.items()
    mine = {
        int(name): dist.get_process_group_ranks(pg)
        for pg, name in names
        if name.isdecimal() and name != "0"
    }
    everyone: list[dict[int, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    made: dict[int, list[int]] = {}
    for groups in everyone:
        made.update(groups)
    return sorted(made.items())


def remake_groups(made: list[tuple[int, list[int]]]) -> None:
    """Make groups of the same ranks again, under the same names. All ranks must call."""
    for number, ranks in made:
        c10d._world.group_count = number
        dist.new_group(ranks)


# libraries that keep process groups in globals
GROUP_LISTS = ("fairscale.nn.model_parallel.initialize", "megatron.core.parallel_state")


def refresh_groups(model: torch.nn.Module) -> None:
    """Replace old process groups by the new ones of the same names, in modules and in the globals
    of parallel libraries."""
    holders: list[Any] = [
        *model.modules(),
        *(sys.modules[name] for name in GROUP_LISTS if name in sys.modules),
    ]
    # FSDP1's handles
    holders += [m._handle for m in model.modules() if getattr(m, "_handle", None) is not None]
    # a library's globals may still belong to an earlier model
    new_names = set(c10d._world.pg_names.values())
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if isinstance(value, dist.ProcessGroup) and value.group_name in new_names:
                setattr(holder, name, c10d._resolve_process_group(value.group_name))


def rebuild_meshes(layout: Layout) -> Any:
    """Make transformers' meshes again, in the order of the load. All ranks must call.

    Groups are looked up by name, so every old mesh, DTensor and closure works again."""
    return initialize_distributed_mesh(distributed_config(layout))[1]


def fix_cached_groups(model: torch.nn.Module) -> None:
    """Replace the process groups that the pipeline stage and FSDP2 cache by the new ones of the
    same names."""
    from torch.distributed.fsdp import FSDPModule

    stage = getattr(model, "_pp_stage", None)
    if stage is not None:
        stage.pp_group = model._mesh_manager.get_mesh("pp").get_group()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in fsdp_groups(module):
                for info in (group.mesh_info, group.post_forward_mesh_info):
                    refresh_mesh_info(info)


def reset_forward(model: torch.nn.Module | None) -> None:
    """Reset FSDP after a forward that was broken off.

    FSDP then still holds some layers' parameters whole, and not the same ones on every rank."""
    from torch.distributed.fsdp import FSDPModule

    # _is_root is None before the first forward
    if isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None:
        model.reset_iter_state()


def reshard(model: torch.nn.Module) -> None:
    """Free the whole parameters that FSDP keeps of some modules after a forward. Sends nothing."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and module._is_root is not None:
            # _handle is None if all its parameters belong to FSDP modules inside it
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(module, handle, True)


def sum_gradients(model: torch.nn.Module) -> None:
    """Make FSDP2 sum gradients over the ranks of a batch.

    By default it averages them, as if each rank's loss were a mean over its own rows."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def in_fsdp1(model: torch.nn.Module) -> bool:
    """Whether FSDP1 wraps a part of the model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def without_gradient_sync(model: torch.nn.Module) -> Any:
    """A context in which DDP leaves gradients alone.

    DDP would average them over all ranks, and expect one for every parameter. Ours are summed
    afterwards."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def flat_owner(
    model: torch.nn.Module, module: torch.nn.Module, name: str
) -> tuple[Any, int] | None:
    """(the FSDP1 module that keeps a module's parameter flattened, the parameter's number there).

    Tied names have the number of the first. None: FSDP1 does not wrap it, or splits nothing."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for fsdp in (m for m in model.modules() if isinstance(m, FullyShardedDataParallel)):
        flat = getattr(fsdp._handle, "flat_param", None)
        if flat is None or fsdp.sharding_strategy == ShardingStrategy.NO_SHARD:
            continue
        own = [(info.param_name, id(info.module)) for info in flat._param_infos]
        for info in flat._shared_param_infos:
            if (info.param_name, id(info.module)) == (name, id(module)):
                return fsdp, own.index((info.prim_param_name, id(info.prim_module)))
        if (name, id(module)) in own:
            return fsdp, own.index((name, id(module)))
    return None


def flat_shape(
    model: torch.nn.Module, module: torch.nn.Module, name: str
) -> tuple[int, ...] | None:
    """The whole shape of a parameter that FSDP1 keeps flattened; None if it does not."""
    found = flat_owner(model, module, name)
    if found is None:
        return None
    fsdp, number = found
    return tuple(fsdp._handle.flat_param._shapes[number])


def flat_local(model: torch.nn.Module, module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """This rank's piece of the flattened parameter that contains this one: (numbers,) on the
    rank's device.

    None: FSDP1 does not keep the parameter flattened."""
    found = flat_owner(model, module, name)
    if found is None:
        return None
    fsdp, _ = found
    return fsdp._handle.flat_param._local_shard


def unflattened(
    model: torch.nn.Module, module: torch.nn.Module, name: str, writeback: bool
) -> contextlib.AbstractContextManager:
    """A context in which the parameter is whole on every rank. All ranks must enter it.

    writeback: keep what is written to it. LookupError: FSDP1 does not keep it flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _lazy_init

    for root in FullyShardedDataParallel.fsdp_modules(model, root_only=True):
        # else, before a first forward, an inner module would take itself for the root
        _lazy_init(root, root)
    found = flat_owner(model, module, name)
    if found is None:
        raise LookupError(f"FSDP1 keeps no {name} of {type(module).__name__} flattened")
    return FullyShardedDataParallel.summon_full_params(found[0], recurse=False, writeback=writeback)


def fsdp_groups(module: Any) -> list[Any]:
    """The parameter groups of an FSDP2 module, which cache process groups."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def refresh_mesh_info(info: Any) -> None:
    """Replace the process groups in FSDP2's mesh info by those that its mesh has now."""
    if info is None:
        return
    for kind in ("shard", "replicate"):
        dim = getattr(info, f"{kind}_mesh_dim", None)
        if dim is not None and hasattr(info, f"{kind}_process_group"):
            setattr(info, f"{kind}_process_group", info.mesh.get_group(dim))
