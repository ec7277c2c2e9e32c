"""Functions that tests run on engines: they reach into the engine's Runtime, as no driver does.
Importable there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flexkernel.engine import DOOR

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "_all_gather_base", "all_reduce", "reduce",
    "broadcast", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "gather", "scatter",
    "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier",
    "all_gather_object", "broadcast_object_list",
)  # fmt: skip


def runtime():
    """This engine's Runtime."""
    return DOOR.runtime


def waits_for_a_controller_s() -> float:
    """How long this engine waits for its controller before it leaves."""
    from ipyparallel.engine.app import IPEngine

    app = IPEngine.instance()
    return app.max_heartbeat_misses * app.hb_check_period / 1000


@contextmanager
def counting() -> Iterator[list[str]]:
    """What this process sends while it is entered: every function of torch.distributed that
    communicates, point to point included, which CommDebugMode does not see; and the functional
    collectives, which it does."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    sent: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    modules = [dist, dist.distributed_c10d]

    def noted(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            sent.append(name)
            return function(*args, **kwargs)

        return wrapper

    for name, function in originals.items():
        # one for both places: P2POp compares its function with the module's
        wrapper = noted(name, function)
        for module in modules:
            setattr(module, name, wrapper)
    try:
        with CommDebugMode() as mode:
            yield sent
        sent += [f"{op}" for op, count in mode.get_comm_counts().items() for _ in range(count)]
    finally:
        for name, function in originals.items():
            for module in modules:
                setattr(module, name, function)


def count_in_runs() -> None:
    """From now on every run of this engine notes what it sends, in `sent_in_run`."""
    import flexkernel.engine.run.forward as forward

    if not hasattr(forward, "_counted_run"):
        forward._counted_run = forward.run

    def run(rt, plan):
        with counting() as sent:
            report = forward._counted_run(rt, plan)
        rt.sent = list(sent)
        return report

    forward.run = run


def sent_in_run() -> list[str]:
    return runtime().sent


def stop_counting() -> None:
    import flexkernel.engine.run.forward as forward

    forward.run = forward._counted_run


# --- faults ---------------------------------------------------------------------------


def once(name: str, rank: int, action: Callable[[], None]) -> None:
    """At the next forward on that rank, act when the module has run."""
    rt = runtime()
    if rt.rank != rank or name not in rt.part.hooks.modules:
        return

    def fire(_module, _args, _out) -> None:
        handle.remove()
        action()

    handle = rt.part.hooks.modules[name].register_forward_hook(fire)


def raise_at(name: str, rank: int) -> None:
    def boom() -> None:
        raise ZeroDivisionError("a test raised this")

    once(name, rank, boom)


def sleep_at(name: str, rank: int, seconds: float = 100.0, sign: str = os.devnull) -> None:
    """In that module, once. sign: a file that is there as soon as it sleeps."""

    def sleep() -> None:
        Path(sign).touch()
        time.sleep(seconds)

    once(name, rank, sleep)


def slowly(seconds: float) -> int:
    """This rank, after a while."""
    time.sleep(seconds)
    return runtime().rank


def die_at(name: str, rank: int, of: int = signal.SIGKILL) -> None:
    once(name, rank, lambda: os.kill(os.getpid(), of))


def slow_at(name: str, seconds: float) -> None:
    """From now on this rank takes so long longer in that module, if it has it; until the next
    load."""
    rt = runtime()
    if name in rt.part.hooks.modules:
        rt.part.hooks.modules[name].register_forward_pre_hook(
            lambda _module, _args: time.sleep(seconds)
        )


def act_at(name: str, rank: int, action: Callable[[], None]) -> None:
    """Do that at the next forward on that rank, when the module has run."""
    once(name, rank, action)


def local_parameters() -> list[torch.Tensor]:
    """The tensors that this rank's parameters lie in; tied ones once."""
    from flexkernel.engine.model.load import own

    return list({tensor.data_ptr(): tensor for tensor in own(runtime().model)}.values())


def weights_at() -> list[int]:
    """Where this rank's parameters lie: equal before and after shows that nothing was loaded
    again."""
    from torch.distributed.fsdp import FSDPModule

    for module in runtime().model.modules():
        if isinstance(module, FSDPModule):  # the root stays unsharded after a forward
            module.reshard()
    return [getattr(p, "_local_tensor", p).data_ptr() for p in runtime().model.parameters()]


# --- builders -------------------------------------------------------------------------


def parallelized(folder: str, sequence: bool = False) -> torch.nn.Module:
    """A tiny Llama under torch's own parallelize_module, tp 2; sequence parallel norms put out
    DTensors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    row = RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()
    plan = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": row,
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": row,
    }
    # inside a layer the sequence is split; between layers it is whole, as the model's masks expect
    if sequence:
        plan |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            ),
            "mlp": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
        }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
        if sequence:
            split = PrepareModuleInput(
                input_layouts=(Replicate(),),
                desired_input_layouts=(Shard(1),),
                use_local_output=True,
            )
            joined = PrepareModuleOutput(
                output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),)
            )
            parallelize_module(layer, mesh, {"": split})
            parallelize_module(layer, mesh, {"": joined})
    return model


def partial_sums(folder: str) -> torch.nn.Module:
    """The same, with hooks' view of o_proj and down_proj left unreduced: each rank holds one
    addend, reduced by the layer's owner. What a wrapper that reduces outside the module makes of a
    row-parallel layer."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rank, world = dist.get_rank(), dist.get_world_size()
    for layer in model.model.layers:
        mlp = layer.mlp
        size = mlp.gate_proj.out_features // world
        mine = slice(rank * size, (rank + 1) * size)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[mine].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, mine].clone())
        layer.mlp = Reduced(mlp)
    return model


class Reduced(torch.nn.Module):
    """Sums an MLP's partial result over all ranks, outside the MLP."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        out = self.inner(x).clone()
        dist.all_reduce(out)
        return out


def fairscale_mlps(folder: str) -> torch.nn.Module:
    """A tiny Llama whose MLPs are fairscale's parallel layers, over all ranks."""
    import torch.distributed as dist
    from fairscale.nn.model_parallel.initialize import (
        destroy_model_parallel,
        initialize_model_parallel,
    )
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from transformers import AutoModelForCausalLM

    rank, world = dist.get_rank(), dist.get_world_size()
    destroy_model_parallel()  # its groups are of the generation before: each load begins a new one
    initialize_model_parallel(world)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            sizes = (old.in_features, old.out_features)
            dim, new = (
                (1, RowParallelLinear(*sizes, bias=False, input_is_parallel=True))
                if name == "down_proj"
                else (0, ColumnParallelLinear(*sizes, bias=False, gather_output=False))
            )
            new.weight = torch.nn.Parameter(old.weight.detach().chunk(world, dim)[rank].clone())
            setattr(layer.mlp, name, new)
    return model


def whole(folder: str) -> torch.nn.Module:
    """The unsharded model of a folder; on the meta device when it is built under one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def whole_reduced(folder: str) -> torch.nn.Module:
    """The unsharded model with the same wrapper around its MLPs, which is then nothing."""
    model = whole(folder)
    for layer in model.model.layers:
        layer.mlp = Passed(layer.mlp)
    return model


class Passed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Slow(torch.nn.Module):
    """Layers that take 0.3 s each."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList(Nap() for _ in range(num_layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Nap(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":
            time.sleep(0.3)
        return x


GRID = {
    "rows": "S0 R",
    "columns": "R S1",
    "both": "S0 S1",
    "twice": "S0 S0",
    "strided": "Z0 R",
    "over": "Z0 S0",
    "copies": "R R",
}


def on_a_grid() -> torch.nn.Module:
    """The same 7 × 10 numbers as DTensors over a mesh of 2 × 2 with names of its own, under the
    placements of GRID."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    kinds = {
        "S0": Shard(0),
        "S1": Shard(1),
        "Z0": _StridedShard(0, split_factor=2),
        "R": Replicate(),
    }
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "cp"))
    model = torch.nn.Module()
    whole = torch.arange(70.0).view(7, 10)
    for name, text in GRID.items():
        spread = distribute_tensor(
            whole, mesh, [kinds[word] for word in text.split()], src_data_rank=None
        )
        model.register_parameter(name, torch.nn.Parameter(spread))
    addend = DTensor.from_local(whole, mesh, [Partial(), Replicate()], run_check=False)
    model.register_parameter("partial", torch.nn.Parameter(addend))
    return model


def in_ddp(folder: str) -> torch.nn.Module:
    """The whole model on every rank, in DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    return DistributedDataParallel(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    )


def in_fsdp1(folder: str) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def no_language_model() -> torch.nn.Module:
    """A module that transformers knows nothing of."""
    return torch.nn.Linear(3, 3)


def limit_logits(num_bytes: int) -> None:
    """From how many bytes on this engine's runs keep the last position's logits only."""
    from flexkernel.memory import plan

    plan.LOGITS_BYTES = num_bytes
