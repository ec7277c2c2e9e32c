"""Every private or fragile API of torch and transformers that we lean on, each wrapped once and
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
    """transformers' config of a layout. Its check refuses pp together with fsdp or dp; both run
    and are equal to the unsharded model (tests/layouts/test_parity.py), so the degrees are checked apart
    and joined afterwards."""
    config = DistributedConfig(
        tp_size=layout.tp, fsdp_size=layout.fsdp, dp_replicate_size=layout.dp
    )
    config.pp_size = layout.pp
    return config


def is_placeholder(module: torch.nn.Module) -> bool:
    """Whether the module stands in for one of another pipeline stage."""
    return isinstance(module, PipelineIdentityLayer)


@contextlib.contextmanager
def loading_under(layout: Layout) -> Iterator[None]:
    """While a model loads: transformers 5.23 resolves the plans for all layers before it replaces
    those that are absent from this stage (KeyError), so each plan is filtered to what the stage
    holds."""
    if layout.pp == 1:
        yield
        return
    names = [
        n
        for n in ("apply_tensor_parallelism", "apply_fully_sharded_data_parallelism")
        if hasattr(mixin, n)
    ]
    original = {name: getattr(mixin, name) for name in names}

    def held(model: torch.nn.Module, plan: dict[str, str]) -> dict[str, str]:
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        return {
            n: s
            for n, s in plan.items()
            if n in parameters or (n in modules and not is_placeholder(modules[n]))
        }

    def tensor_parallel(model, mesh, plan):
        return original["apply_tensor_parallelism"](model, mesh, held(model, plan))

    def data_parallel(model, meshes, plan, ep_plan):
        return original["apply_fully_sharded_data_parallelism"](
            model, meshes, held(model, plan), ep_plan
        )

    mixin.apply_tensor_parallelism = tensor_parallel
    mixin.apply_fully_sharded_data_parallelism = data_parallel
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(mixin, name, function)


@contextlib.contextmanager
def meshes_on(device: str) -> Iterator[None]:
    """While it is entered transformers makes its meshes, and loads, on such a device: it takes the
    machine's accelerator, whatever one asks for."""
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
    """Module or parameter name → the tensor-parallel style that transformers' plan gives it; empty
    without tp."""
    if layout.tp == 1 or not hasattr(model, "_resolve_parallel_plans"):
        return {}
    return dict(model._resolve_parallel_plans(DistributedConfig(tp_size=layout.tp))[0])


@contextlib.contextmanager
def stage_edges(model: torch.nn.Module, tape: Any) -> Iterator[None]:
    """While a forward runs with a graph: what this pipeline stage sends and receives is kept on
    the tape, as ends of this rank's graph, and the last stage puts out its own logits, not the
    copy that it sends round."""
    stage: Any = getattr(model, "_pp_stage", None)
    if stage is None:
        yield
        return
    plain, from_last = stage.communicate, stage.broadcast_from_last

    def communicate(
        operation: str, *, tensor: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor | None:
        if tensor is not None:
            if not stage.pp_is_last_stage:
                tape.sent = tensor
            return plain(operation, tensor=tensor.detach(), **rest)
        got = plain(operation, **rest)
        tape.received = None if got is None else got.requires_grad_()
        return got

    def broadcast_from_last(tensor: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        copy = from_last(None if tensor is None else tensor.detach(), **rest)
        return copy if tensor is None else tensor

    stage.communicate, stage.broadcast_from_last = communicate, broadcast_from_last
    try:
        yield
    finally:
        del stage.communicate, stage.broadcast_from_last


def stage_peer(model: torch.nn.Module, step: int) -> tuple[dist.ProcessGroup, int, bool]:
    """(the group of a pipeline, the global rank so many stages on, whether it talks through host
    memory)."""
    stage: Any = model._pp_stage
    return (
        stage.pp_group,
        dist.get_global_rank(stage.pp_group, stage.pp_rank + step),
        stage.comm_on_cpu,
    )


def fill_buffers(model: Any, device: str) -> None:
    """Give a model that was built on meta the buffers that no checkpoint has, such as rotary
    frequencies, as from_pretrained does: by the model's own initialisation, of the modules that
    own some."""
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
    """transformers' own attention functions by name, as they were before ours stood in for
    them."""
    return _ORIGINAL_ATTENTION


def set_attention(name: str, function: Callable) -> None:
    """Put a function in the place of the attention of that name; under an existing name the masks
    stay as they are."""
    AttentionInterface.register(name, function)


def eager_attention(module: torch.nn.Module) -> Callable:
    """The eager attention of the module's own modeling file."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise LookupError(f"{type(module).__name__} has no eager_attention_forward")


# --- transformers: generation ---------------------------------------------------------


class StageCache(DynamicCache):
    """The key/value cache of one pipeline stage. transformers asks a layer of each kind for the
    lengths that masks and positions need, the first of the model; on another stage that one stays
    empty, and the answer would be 0: wrong tokens, without an error. Here a layer that this stage
    has answers for it."""

    def __init__(self, model: Any):
        config = model.config.get_text_config(decoder=True)
        super().__init__(config=config)
        stage = model._pp_stage
        self._owned = range(*stage.layer_range_for_rank(stage.pp_rank, config.num_hidden_layers))

    def _answers(self, layer: int) -> int:
        if layer in self._owned:
            return layer
        alike = [i for i in self._owned if self.is_sliding[i] == self.is_sliding[layer]]
        return (alike or self._owned)[0]  # with none alike no mask of that kind is used here

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._answers(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._answers(layer_idx))


# --- wrappers -------------------------------------------------------------------------

WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def own_modules(model: torch.nn.Module, twice: bool = False) -> dict[str, torch.nn.Module]:
    """The user's modules under the names they have in the unsharded model: what DDP, FSDP, compile
    and checkpointing put around a module takes part in neither. twice: one that is there twice
    under each of its names."""
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
                walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return found


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
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
    """Whether the model or a module of it is given to torch.compile."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextlib.contextmanager
def as_written(compiled: bool) -> Iterator[None]:
    """While it is entered, torch.compile's modules run without being compiled; only looked after
    if there are any."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# --- torch ----------------------------------------------------------------------------


def inner(parameter: torch.Tensor) -> torch.Tensor:
    """The very tensor in which this rank's part of a parameter lies, to be given other memory: of
    a DTensor parameter to_local() is a view of it."""
    return getattr(parameter, "_local_tensor", parameter)


def waited(value: torch.Tensor) -> torch.Tensor:
    """A value whose collective has arrived: tensor parallelism hands out tensors that are still on
    their way."""
    if not isinstance(value, AsyncCollectiveTensor):
        return value
    return _Waited.apply(value) if value.requires_grad else value.wait()


class _Waited(torch.autograd.Function):
    """Waiting keeps the graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def is_split(placement: Placement) -> bool:
    """Whether it gives each rank a part, one in strides included, which is no Shard to torch."""
    return isinstance(placement, Shard | _StridedShard)


def split_factor(placement: Placement) -> int:
    """Into how many groups a strided shard parts its dim before each rank takes a piece of each; 1
    for others."""
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


def split_index(placement: Any, index: torch.Tensor, num_parts: int, part: int) -> torch.Tensor:
    """What of a 1-D index lies on one of the ranks that a placement splits over, in the order in
    which it lies there: a DTensor's data is split by the same function."""
    there = (
        type(placement)(0, split_factor=split_factor(placement))
        if split_factor(placement) > 1
        else Shard(0)
    )
    return there._split_tensor(index, num_parts, with_padding=False, contiguous=False)[0][part]


def all_gather_single(
    whole: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup | None = None
) -> dist.Work:
    """Begin to gather every rank's equal part. torch 2.13 warns of the name that older ones have
    only."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(whole, mine, group=group, async_op=True)


def abort_groups() -> None:
    """Drop every process group of this process, also one that is broken or half made, and start
    counting anew."""
    if dist.is_initialized():
        c10d._abort_process_group()
    # differs between ranks after an init that failed on some; the next would hang
    c10d._world.group_count = 0


def abort_nccl() -> None:
    """Abort what NCCL does in this process, in all groups at once: one after another they could
    wait for each other. From any thread. The groups stay until abort_groups() drops them; whoever
    waits goes on with what is there."""
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
    """What a group sends by between GPUs; None where that is not NCCL."""
    if not dist.is_nccl_available() or "cuda" not in {
        device.type for device in group._device_types
    }:
        return None
    backend = group._get_backend(torch.device("cuda"))
    return backend if isinstance(backend, dist.ProcessGroupNCCL) else None


def forget_meshes() -> None:
    """Empty what DTensor remembers of its operations: every mesh that one was ever made on, with
    its groups, their threads and sockets, stays for as long as it does."""
    # as torch.distributed.tensor.debug does, which would bring torch's compiler in: a second, at
    # each engine's start
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


@contextlib.contextmanager
def alone(rank: int, world: int) -> Iterator[None]:
    """Groups in which this rank has all its places and no peers: whoever builds meshes or shards
    in them sends nothing and waits for nobody. What a collective would bring is not there: only
    for code that needs none."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    abort_groups()
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        yield
    finally:
        abort_groups()


def made_groups() -> list[tuple[int, list[int]]]:
    """Every group that any rank has beside the default one, (its number, its ranks) in the order
    in which they were made. All ranks must call."""
    names = c10d._world.pg_names.items()
    mine = {
        int(name): dist.get_process_group_ranks(pg)
        for pg, name in names
        if name.isdecimal() and name != "0"
    }
    everyone: list[dict[int, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return sorted(
        {number: ranks for of_rank in everyone for number, ranks in of_rank.items()}.items()
    )


def remake_groups(made: list[tuple[int, list[int]]]) -> None:
    """Groups of the same ranks under the names that they had. All ranks must call."""
    for number, ranks in made:
        c10d._world.group_count = number
        dist.new_group(ranks)


# keep theirs in globals
GROUP_LISTS = ("fairscale.nn.model_parallel.initialize", "megatron.core.parallel_state")


def refresh_groups(model: torch.nn.Module) -> None:
    """Give what remembers a process group the new one of its name: modules, and parallel
    libraries' own globals."""
    holders: list[Any] = [
        *model.modules(),
        *(sys.modules[name] for name in GROUP_LISTS if name in sys.modules),
    ]
    # FSDP1's
    holders += [m._handle for m in model.modules() if getattr(m, "_handle", None) is not None]
    # a library's globals may be of a model that is gone
    there = set(c10d._world.pg_names.values())
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if isinstance(value, dist.ProcessGroup) and value.group_name in there:
                setattr(holder, name, c10d._resolve_process_group(value.group_name))


def rebuild_meshes(layout: Layout) -> Any:
    """transformers' meshes again under new groups, in the order of the load: groups are found by
    name, so that every old mesh, DTensor and closure works again."""
    return initialize_distributed_mesh(distributed_config(layout))[1]


def fix_cached_groups(model: torch.nn.Module) -> None:
    """Give the objects that remember a process group the new one of the same name."""
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
    """Forget a forward that broke off: FSDP holds some layers' parameters whole, not the same ones
    on every rank."""
    from torch.distributed.fsdp import FSDPModule

    # None: it has run no forward
    if isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None:
        model.reset_iter_state()


def reshard(model: torch.nn.Module) -> None:
    """Let go of the whole parameters that FSDP keeps of some modules after a forward: sends
    nothing."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and module._is_root is not None:
            # None where it has no parameters beside those of modules within it
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(module, handle, True)


def sum_gradients(model: torch.nn.Module) -> None:
    """Have FSDP2 sum gradients over the groups of rows: it averages, as if the loss were a mean
    over its own rows."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def in_fsdp1(model: torch.nn.Module) -> bool:
    """Whether FSDP1 wraps some of the model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def without_gradient_sync(model: torch.nn.Module) -> Any:
    """DDP would average gradients over all ranks, and expect one for every parameter: ours are
    summed afterwards."""
    from torch.nn.parallel import DistributedDataParallel

    return (
        model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    )


def flat_owner(
    model: torch.nn.Module, module: torch.nn.Module, name: str
) -> tuple[Any, int] | None:
    """The FSDP1 module that keeps this parameter of a module in a flattened one, and its number
    there; tied names have the number of the first. None where FSDP1 has no part in it, or splits
    nothing."""
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
    """The whole shape of a parameter that FSDP1 keeps flattened; None where it does not."""
    found = flat_owner(model, module, name)
    return None if found is None else tuple(found[0]._handle.flat_param._shapes[found[1]])


def flat_local(model: torch.nn.Module, module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """This rank's piece of the flattened parameter in which FSDP1 keeps it."""
    found = flat_owner(model, module, name)
    return None if found is None else found[0]._handle.flat_param._local_shard


def unflattened(
    model: torch.nn.Module, module: torch.nn.Module, name: str, writeback: bool
) -> contextlib.AbstractContextManager:
    """While it is entered, the parameter is whole on every rank. All ranks must."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _lazy_init

    for root in FullyShardedDataParallel.fsdp_modules(model, root_only=True):
        # or the module within it takes itself for the root, before a first forward
        _lazy_init(root, root)
    found = flat_owner(model, module, name)
    assert found is not None
    return FullyShardedDataParallel.summon_full_params(found[0], recurse=False, writeback=writeback)


def fsdp_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def refresh_mesh_info(info: Any) -> None:
    if info is None:
        return
    for kind in ("shard", "replicate"):
        dim = getattr(info, f"{kind}_mesh_dim", None)
        if dim is not None and hasattr(info, f"{kind}_process_group"):
            setattr(info, f"{kind}_process_group", info.mesh.get_group(dim))
