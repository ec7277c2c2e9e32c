"""Pins: the private APIs that compat.py wraps are as it takes them. A new torch or transformers
fails here."""

from __future__ import annotations

import ast
import dataclasses
import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor, _redistribute
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from transformers.distributed import DistributedConfig, mixin
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from flexkernel.engine import compat
from flexkernel.wire import Layout


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- transformers: generation ---------------------------------------------------------


@pytest.mark.parametrize("layers", [range(2), range(2, 4)])
def test_a_stages_cache_answers_from_a_layer_of_the_same_kind_that_it_has(layers):
    """Gemma-2's layers take turns, sliding and not; transformers asks the model's first of each
    kind."""
    config = transformers.Gemma2Config(
        num_hidden_layers=4, sliding_window=8, num_attention_heads=2, head_dim=4
    )
    model = nn.Module()
    model.config = config
    stage = SimpleNamespace(
        pp_rank=0, layer_range_for_rank=lambda _rank, _num_layers: (layers.start, layers.stop)
    )
    model._pp_stage = stage
    cache, plain = compat.StageCache(model), transformers.DynamicCache(config=config)
    assert cache.is_sliding == [True, False, True, False]
    keys = torch.zeros(1, 2, 20, 4)
    for layer in layers:
        cache.update(keys, keys, layer)
    for layer in range(4):
        plain.update(keys, keys, layer)
    for asked in (0, 1):
        assert cache.get_seq_length(asked) == 20
        assert (
            cache.get_mask_sizes(1, asked)
            == plain.get_mask_sizes(1, asked)
            == ((8, 13) if asked == 0 else (21, 0))
        )


def test_transformers_takes_the_loops_arguments():
    assert {"streamer", "synced_gpus"} <= set(parameters(transformers.GenerationMixin.generate))
    assert parameters(transformers.DynamicCache.get_mask_sizes) == [
        "self",
        "query_length",
        "layer_idx",
    ]


# --- transformers: loading ------------------------------------------------------------


def test_the_pinned_transformers_is_there():
    assert transformers.__version__.startswith("5.23.")


def test_a_distributed_config_has_the_degrees():
    names = {field.name for field in dataclasses.fields(DistributedConfig)}
    assert {"tp_size", "pp_size", "fsdp_size", "dp_replicate_size"} <= names


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2, tp=3), Layout(pp=2, fsdp=2), Layout(pp=2, dp=3, fsdp=2)]
)
def test_every_product_of_degrees_is_configured(layout):
    """transformers' own check refuses pp together with fsdp or dp; were it to accept them, the way
    around can go."""
    config = compat.distributed_config(layout)
    degrees = (config.pp_size, config.dp_replicate_size, config.fsdp_size, config.tp_size)
    assert degrees == (layout.pp, layout.dp, layout.fsdp, layout.tp)


def test_transformers_still_refuses_pp_with_fsdp():
    with pytest.raises(ValueError, match=r"(?i)pp|pipeline"):
        DistributedConfig(pp_size=2, fsdp_size=2)


def test_a_placeholder_is_told_from_a_module():
    assert compat.is_placeholder(PipelineIdentityLayer()) and not compat.is_placeholder(
        nn.Identity()
    )


PATCHED = {
    "apply_tensor_parallelism": 3,  # model, mesh, plan
    "apply_fully_sharded_data_parallelism": 4,  # model, meshes, plan, plan of experts
}


@pytest.mark.parametrize(("name", "count"), PATCHED.items())
def test_the_functions_stood_in_for_take_what_ours_take(name, count):
    required = [
        p
        for p in inspect.signature(getattr(mixin, name)).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    assert len(required) == count, required


def test_the_mixin_calls_them_by_position():
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(mixin))) if isinstance(n, ast.Call)]
    for name, count in PATCHED.items():
        found = [call for call in calls if getattr(call.func, "id", "") == name]
        assert found and all(len(call.args) == count and not call.keywords for call in found)


def test_they_are_stood_in_for_while_loading_under_stages_only():
    before = {name: getattr(mixin, name) for name in PATCHED}
    with compat.loading_under(Layout(tp=2)):
        assert {name: getattr(mixin, name) for name in PATCHED} == before
    with compat.loading_under(Layout(pp=2)):
        assert all(getattr(mixin, name) is not before[name] for name in PATCHED)
    assert {name: getattr(mixin, name) for name in PATCHED} == before
    with pytest.raises(ZeroDivisionError), compat.loading_under(Layout(pp=2)):
        raise ZeroDivisionError
    assert {name: getattr(mixin, name) for name in PATCHED} == before


def test_a_plan_is_filtered_to_what_the_stage_holds(monkeypatch):
    seen = []
    monkeypatch.setattr(
        mixin, "apply_tensor_parallelism", lambda model, mesh, plan: seen.append(plan)
    )
    model = nn.ModuleDict({"here": nn.Linear(2, 2), "there": PipelineIdentityLayer()})
    plan = {
        "here": "colwise",
        "here.weight": "colwise",
        "there": "colwise",
        "there.weight": "colwise",
        "gone": "rowwise",
    }
    with compat.loading_under(Layout(pp=2)):
        mixin.apply_tensor_parallelism(model, None, plan)
    assert seen == [{"here": "colwise", "here.weight": "colwise"}]


def tiny_llama(**more) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        **more,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_a_models_plan_names_its_modules_styles():
    styles = compat.tp_styles(tiny_llama(), Layout(tp=2))
    assert styles["model.layers.0.self_attn.q_proj"] == "colwise"
    assert styles["model.layers.0.mlp.down_proj"] == "rowwise"
    assert styles["lm_head"] == "colwise_gather_output"
    assert compat.tp_styles(tiny_llama(), Layout(pp=2)) == {}
    assert compat.tp_styles(nn.Linear(1, 1), Layout(tp=2)) == {}


def test_resolving_a_plan_returns_the_tensor_parallel_one_first():
    plans = tiny_llama()._resolve_parallel_plans(DistributedConfig(tp_size=2))
    assert isinstance(plans, tuple) and plans[0]["model.layers.0.self_attn.o_proj"] == "rowwise"


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_buffers_that_no_checkpoint_has_are_filled_as_from_pretrained_does(arch):
    from tests.support import models

    whole = models.build(arch)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(whole.config)
    compat.fill_buffers(empty, "cpu")
    filled, truth = dict(empty.named_buffers()), dict(whole.named_buffers())
    assert filled.keys() == truth.keys() and (filled or arch == "gpt2")
    assert all(torch.equal(filled[name], buffer) for name, buffer in truth.items())
    assert all(parameter.is_meta for parameter in empty.parameters())


# --- transformers: attention ----------------------------------------------------------


def test_attention_functions_are_those_of_transformers_whatever_stands_in():
    from flexkernel.engine.model import attention

    before = dict(compat.attention_functions())
    attention.install()
    attention.install()
    assert compat.attention_functions() == before and "sdpa" in before
    assert all("flexkernel" not in function.__module__ for function in before.values())
    assert AttentionInterface()["sdpa"].__module__ == "flexkernel.engine.model.attention"


def test_attention_is_looked_up_by_name_with_eager_as_the_default():
    assert parameters(AttentionInterface.get_interface)[1:3] == ["attn_implementation", "default"]


def test_eager_attention_is_the_modeling_files_own():
    from transformers.models.llama import modeling_llama

    module = tiny_llama().model.layers[0].self_attn
    assert compat.eager_attention(module) is modeling_llama.eager_attention_forward
    assert parameters(modeling_llama.eager_attention_forward)[:5] == [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
    ]

    class Mine(type(module)):
        pass

    assert compat.eager_attention(object.__new__(Mine)) is modeling_llama.eager_attention_forward
    with pytest.raises(LookupError, match="Linear has no eager_attention_forward"):
        compat.eager_attention(nn.Linear(1, 1))


# --- wrappers -------------------------------------------------------------------------


def inner() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"deep": nn.Sequential(nn.ReLU())}))


NAMES = ["", "0", "1", "1.deep", "1.deep.0"]


@pytest.fixture
def one_rank():
    """A gloo group of this process alone."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_bare_model_has_its_own_names():
    model = inner()
    assert (
        compat.own_modules(model) == dict(model.named_modules())
        and list(compat.own_modules(model)) == NAMES
    )


def test_ddp_takes_no_part_in_names(one_rank):
    model = inner()
    found = compat.own_modules(DistributedDataParallel(model))
    assert found == dict(model.named_modules())
    assert compat.own_modules(DistributedDataParallel(torch.compile(model))) == found


def test_compile_takes_no_part_in_names():
    model = inner()
    model[1] = torch.compile(model[1])
    assert list(compat.own_modules(torch.compile(model))) == NAMES


def test_checkpoint_wrappers_take_no_part_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = inner()
    model[0] = checkpoint_wrapper(model[0])
    assert list(compat.own_modules(checkpoint_wrapper(model))) == NAMES


def test_fsdp1_takes_no_part_in_names(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = inner()
    model[0] = FullyShardedDataParallel(
        model[0], device_id=torch.device("cpu"), use_orig_params=True
    )
    whole = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    found = compat.own_modules(whole)
    assert list(found) == NAMES and isinstance(found["0"], nn.Linear)


def test_a_shared_module_has_one_name_the_first():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert (
        list(compat.own_modules(model)) == ["", "a", "b"] == [n for n, _ in model.named_modules()]
    )


def test_a_module_of_the_users_that_is_called_module_stays():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert list(compat.own_modules(model)) == ["", "module"]


# --- torch ----------------------------------------------------------------------------


def test_a_value_that_is_there_is_not_waited_for():
    value = torch.ones(2)
    assert compat.waited(value) is value


def test_a_value_on_its_way_is_waited_for(one_rank):
    from torch.distributed import _functional_collectives as functional

    coming = functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
    assert isinstance(coming, functional.AsyncCollectiveTensor)
    arrived = compat.waited(coming)
    assert type(arrived) is torch.Tensor and arrived.tolist() == [1.0, 1.0]


def test_groups_are_dropped_and_counted_anew():
    compat.abort_groups()
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.new_group([0])
        compat.abort_groups()
        assert not dist.is_initialized() and c10d._world.group_count == 0


def test_alone_a_rank_has_its_place_and_waits_for_nobody():
    from torch.distributed.device_mesh import init_device_mesh

    with compat.alone(2, 4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
        assert dist.get_rank() == 2 and list(mesh.get_coordinate()) == [1, 0]
        dist.all_reduce(torch.ones(2), group=mesh.get_group("tp"))
    assert not dist.is_initialized()


def test_groups_can_be_made_again_under_their_names(one_rank):
    dist.new_group([0])
    holder = nn.Module()
    holder.group = dist.new_group([0])
    made = compat.made_groups()
    assert made == [(1, [0]), (2, [0])]
    compat.abort_groups()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    compat.remake_groups(made)
    old = holder.group
    compat.refresh_groups(holder)
    assert holder.group is not old and holder.group.group_name == old.group_name == "2"
    dist.all_reduce(torch.ones(2), group=holder.group)


def test_the_private_names_of_torch_are_there():
    from torch.distributed.fsdp import FSDPModule

    assert callable(c10d._abort_process_group) and hasattr(FSDPModule, "_get_fsdp_state")


def test_what_fsdp_remembers_of_its_groups_can_be_made_anew(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(
        nn.Linear(2, 3), mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    )
    before = model(torch.ones(1, 2))
    (group, *_) = compat.fsdp_groups(model)
    assert group.mesh_info.shard_process_group is not None
    group.mesh_info.shard_process_group = None
    compat.fix_cached_groups(model)
    assert group.mesh_info.shard_process_group is group.mesh_info.mesh.get_group(0)
    assert torch.equal(model(torch.ones(1, 2)), before)


def test_the_meshes_are_made_by_transformers_in_one_call():
    from transformers.distributed.utils import initialize_distributed_mesh

    assert parameters(initialize_distributed_mesh)[0] == "distributed_config"


def test_meshes_are_on_the_device_asked_for_whatever_the_machine_has(monkeypatch):
    """A machine with a GPU: transformers would bind it, and load there, though the groups are the
    CPU's."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    with compat.alone(0, 2):
        with compat.meshes_on("cpu"):
            meshes = compat.rebuild_meshes(Layout(tp=2))
        assert meshes.get_mesh("tp").device_type == "cpu"
    assert torch._C._get_accelerator().type == "cuda"


def test_nothing_of_nccl_is_aborted_where_groups_send_otherwise(one_rank):
    group = dist.new_group([0])
    assert [compat.nccl_of(each) for each in c10d._world.pg_names] == [None, None]
    compat.abort_nccl()
    dist.all_reduce(torch.ones(2), group=group)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nccl_is_aborted_in_all_groups_at_once():
    compat.abort_groups()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    groups = [dist.group.WORLD, dist.new_group([0]), dist.new_group([0], backend="gloo")]
    assert [compat.nccl_of(group) is not None for group in groups] == [True, True, False]
    dist.all_reduce(torch.ones(2, device="cuda"))
    compat.abort_nccl()
    with pytest.raises(RuntimeError, match="NCCL communicator was aborted"):
        dist.all_reduce(torch.ones(2, device="cuda"))
    dist.all_reduce(torch.ones(2))
    compat.abort_groups()


def test_dtensor_can_be_made_to_forget_its_meshes():
    """Its caches hold every mesh that an operation was ever planned on."""
    forgotten = []

    class Planned:
        pass

    planned = Planned()
    mesh = weakref.ref(planned, lambda _: forgotten.append(1))
    _redistribute._planner_cache[mesh, planned] = planned
    del planned
    compat.forget_meshes()
    gc.collect()
    assert forgotten == [1] and not _redistribute._planner_cache
    assert _redistribute._gen_transform_infos.cache_info().currsize == 0
    assert (
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_info().currsize == 0
    )


# --- FSDP1 ----------------------------------------------------------------------------


def test_fsdp1_keeps_what_its_flat_parameters_are_made_of(one_rank):
    """Pins what session.parameter reads of FSDP1: the names, whole shapes and tied names of a flat
    parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, _runtime_utils

    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    model[1].weight = model[0].weight
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert compat.flat_shape(wrapped, model[0], "weight") is None, "one rank splits nothing"
    wrapped.sharding_strategy = ShardingStrategy.FULL_SHARD
    assert (
        compat.flat_shape(wrapped, model[0], "weight")
        == compat.flat_shape(wrapped, model[1], "weight")
        == (2, 3)
    )
    assert compat.flat_shape(wrapped, model[0], "bias") is None
    assert hasattr(wrapped._handle, "needs_unshard") and hasattr(
        wrapped._handle, "uses_sharded_strategy"
    )
    assert list(inspect.signature(_runtime_utils._reshard).parameters)[:3] == [
        "state",
        "handle",
        "free_unsharded_flat_param",
    ]
    assert len(inspect.signature(_runtime_utils._lazy_init).parameters) == 2


def test_what_was_compiled_can_run_as_it_is_written():
    """Compiled code has the hooks of the moment in which it was made: one that came later does not
    fire."""
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert compat.is_compiled(model) and not compat.is_compiled(nn.Linear(2, 2))
    inside = nn.Sequential(nn.Linear(2, 2))
    inside[0].compile(backend="eager")
    assert compat.is_compiled(inside)
    with torch.no_grad():
        model(torch.zeros(1, 2))
        fired = []
        model._orig_mod[0].register_forward_hook(lambda *_: fired.append(1))
        with compat.as_written(True):
            model(torch.zeros(1, 2))
        assert fired == [1]


# --- torch: where a parameter lies ----------------------------------------------------


def test_the_inner_tensor_of_a_dtensor_parameter_can_be_given_other_memory(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
    with torch.no_grad():
        compat.inner(parameter).set_(torch.full((3,), 2.0))
    assert parameter.to_local().tolist() == [2.0, 2.0, 2.0]
    plain = nn.Parameter(torch.ones(3))
    assert compat.inner(plain) is plain
