"""Bad inputs, by number: what each is, the models that have them, and what has to be true after
each. Importable on engines. The tests are test_bad_inputs.py, test_bad_loads.py,
test_bad_sessions.py and those that ELSEWHERE names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import models, unsharded

LENGTHS = [5, 3]
BATCH = models.ids_and_mask(LENGTHS)
ROWS = models.rows(BATCH)
MASK = BATCH["attention_mask"].bool()
TP = {"tp": 2}

CATALOGUE = {
    1: "a module's name that is nearly one",
    2: "an empty name",
    3: "a glob that matches nothing",
    4: "a glob that matches 10,000 modules",
    5: "a module of another pipeline stage",
    6: "a module that never fires",
    7: "a module that fires twice in a forward",
    8: "a hook registered twice",
    9: "removing a hook that is not there",
    10: "a hook on a list, an identity, a placeholder of another stage",
    11: "a name of unicode, of newlines, of 200 kB",
    12: "a name with __class__ in it",
    13: "an output that is a tuple, a dict, a dataclass, None, text",
    14: "a tensor without elements",
    15: "a tensor without dims",
    16: "a tensor that is not contiguous, or expanded",
    17: "a tensor of fp8, bf16, bool, complex or packed int4",
    18: "a sparse, a nested, a quantised tensor",
    19: "a leaf that requires a gradient",
    20: "an inference tensor, edited in place",
    21: "an AsyncCollectiveTensor",
    22: "a partial sum",
    23: "shards of uneven size",
    24: "more than 2 GB, and more than there is memory",
    25: "NaN, Inf, denormals and -0.0 in a view",
    26: "an edit that returns another shape",
    27: "an edit that returns another dtype or device",
    28: "an edit that returns None",
    29: "an edit that raises on one rank only",
    30: "an edit that exits, or is interrupted",
    31: "an edit that loops for ever",
    32: "an edit with a collective of its own",
    33: "an edit that cannot be pickled",
    34: "an edit that holds 5 GB",
    35: "an edit that prints a gigabyte",
    36: "an edit that starts threads, or forks",
    37: "an edit that changes the modules, or hooks them, while they fire",
    38: "an edit that calls the model",
    39: "an edit that sets the seed, or other state of the process",
    40: "an edit in another Python's syntax",
    41: "an empty prompt",
    42: "a batch without rows",
    43: "a prompt longer than the model's positions",
    44: "a token id outside the vocabulary",
    45: "rows of several lengths and no token to pad with",
    46: "a batch that the groups cannot share out evenly",
    47: "emoji, right-to-left text, NUL, half a surrogate pair",
    48: "a prompt of 10 MB",
    49: "a shard that is missing",
    50: "a shard that is cut off",
    51: "an index that names ../../etc/passwd",
    52: "a link in a circle",
    53: "a config with code of its own",
    54: "float8 as the dtype",
    55: "tp=2 for nine heads",
    56: "three engines for a mesh of 2 × 2",
    57: "one model loaded over another",
    58: "a pickle that is called .safetensors",
    59: "another model's tokenizer",
    60: "a disk that goes while it is read",
    61: "a cluster file that is broken, empty, somebody else's, or readable by others",
    62: "the file of a cluster that is dead",
    63: "attaching during a load",
    64: "leaving during a forward",
    65: "two notebooks that hook at once",
    66: "a clock that jumps",
    67: "a host whose name leads nowhere",
    68: "a home folder that cannot be written",
    69: "64 open files at most",
    70: "a notebook kernel that is restarted five times",
    71: "Ctrl-C at 100 moments at random",
    72: "messages signed with another key",
    73: "a message that is sent again",
    74: "random bytes to every port that listens",
    75: "200 idle connections to every port that listens",
    76: "a header that says 2**31 dims",
}

# Tests of other files that are about one of these and nothing else
ELSEWHERE = {
    8: "session/test_session.py::test_hooking_twenty_times_leaves_one_hook",
    22: "layouts/test_evidence.py::test_the_digest_decides_between_copies_and_addends",
    26: "engine/run/test_edits.py::test_a_bad_edit_is_one_error_and_the_next_run_is_right",
    28: "engine/run/test_edits.py::test_a_bad_edit_is_one_error_and_the_next_run_is_right",
    31: "engine/run/test_sandbox.py::test_an_edit_that_loops_for_ever_is_broken_off_by_the_timeout",
    32: "engine/run/test_sandbox.py::test_what_an_edit_may_not_do_is_refused_at_once",
    35: "engine/run/test_sandbox.py::test_what_an_edit_may_not_do_is_refused_at_once",
    53: "engine/model/test_load.py::test_code_of_a_repository_is_not_run",
    55: "engine/model/test_load.py::test_tp_must_divide_the_heads_and_says_what_would",
    57: "session/test_session.py::test_loading_again_begins_without_hooks",
    62: "notebook/test_magics.py::test_the_file_of_a_dead_cluster_is_one_block",
    65: "cluster/test_cluster.py::test_a_session_whose_engines_another_took_says_so_and_can_take_them_back",
    76: "memory/test_channel.py::test_a_senseless_request_gets_an_error_and_the_next_an_answer",
}


def fit(session: Any, folder: Path, **layout: int) -> None:
    """Have this model loaded so, if it is not."""
    wanted = {axis: layout.get(axis, 1) for axis in ("pp", "dp", "fsdp", "tp")}
    loaded = session._loaded
    info = None if loaded is None else loaded.info
    if (
        info is None
        or info.path != str(folder)
        or any(getattr(info.layout, a) != n for a, n in wanted.items())
    ):
        session.load(folder, **layout)


def healthy(session: Any, folder: Path, **layout: int) -> None:
    """A run of this model, loaded so, equals the unsharded one; every engine answers."""
    session.unhook() if session.has_model else None
    fit(session, folder, **layout)
    session.hook("model.layers.1.mlp")
    run = session.run(ROWS)
    assert run["model.layers.1.mlp"].tensor().shape == (2, 5, 64)
    torch.testing.assert_close(
        run.logits.tensor()[MASK], unsharded.logits(folder, ROWS)[MASK], atol=2e-5, rtol=2e-5
    )
    session.unhook()
    assert all(session.engines.answering())


# --- values that are hard to read -----------------------------------------------------


class Returns(nn.Module):
    """Puts out what a function makes of x. The functions are of this file: an engine finds them by
    name."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight


def inferred(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x * 2


def packed(x: torch.Tensor) -> torch.Tensor:
    """Two four-bit numbers in a byte."""
    low = x.abs().clamp(max=15).to(torch.uint8)
    return low[..., ::2] | (low[..., 1::2] << 4)


VALUES = {
    "empty": lambda x: x[:, :0],
    "scalar": lambda x: torch.ones((), dtype=x.dtype, device=x.device),
    "strided": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[..., :1].expand(-1, -1, 6),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "bf16": lambda x: x.to(torch.bfloat16),
    "bools": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x + 1),
    "int4": packed,
    "text": lambda x: "text",
    "none": lambda x: None,
    "inferred": inferred,
}
ODD = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.as_nested_tensor([x[0], x[0, :2]]),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
}


class Values(nn.Module):
    """A model whose modules put out what is hard to read. It goes on with plain tensors."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.twice, self.leaf, self.same = (
            nn.Embedding(64, 4),
            nn.Linear(4, 4),
            Leaf(),
            nn.Identity(),
        )
        self.kinds = nn.ModuleDict({name: Returns((VALUES | ODD)[name]) for name in names})
        self.unused = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        x = self.twice(self.twice(self.embed(input_ids)))
        for module in self.kinds.values():
            module(x)
        self.leaf(x)
        return self.same(x)


def values() -> nn.Module:
    return Values(tuple(VALUES)).eval()


def odd() -> nn.Module:
    return Values(tuple(ODD)).eval()


class Gathered(nn.Module):
    """Puts out a value that is still on its way from the other ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist
        import torch.distributed._functional_collectives as funcol

        return (
            funcol.all_reduce(x, "sum", dist.group.WORLD)
            if dist.is_initialized() and not x.is_meta
            else x
        )


class OnItsWay(nn.Module):
    def __init__(self, world: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.gathered, self.world = nn.Embedding(64, 4), Gathered(), world

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        return self.gathered(self.embed(input_ids) / self.world) + 1


def on_its_way() -> nn.Module:
    return OnItsWay(2)


def there_already() -> nn.Module:
    return OnItsWay(1)


class Many(nn.Module):
    """Ten thousand modules."""

    def __init__(self, count: int = 10_000) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(64, 2)
        self.steps = nn.ModuleList([nn.Identity() for _ in range(count)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for step in self.steps:
            x = step(x)
        return x


class Wide(nn.Module):
    """A value of 2.1 GB: position s of the text has the numbers from its token's on."""

    WIDTH = 2_150_000

    def __init__(self) -> None:
        super().__init__()
        self.wide = Counting(self.WIDTH)

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        return self.wide(input_ids)[..., :8].clone()


class Counting(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        row = torch.arange(self.width, dtype=torch.float32, device=input_ids.device)
        return input_ids[..., None] + row


# --- edits ----------------------------------------------------------------------------


def add_in_place(x, ctx):
    return x.add_(1)


def raises_on_rank_1(x, ctx):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ZeroDivisionError("on rank 1")
    return x


def exits(x, ctx):
    raise SystemExit(3)


def interrupts(x, ctx):
    raise KeyboardInterrupt


def ends_the_process(x, ctx):
    import os

    os._exit(7)


def calls_everything(x, ctx):
    from flexkernel.engine import DOOR

    DOOR.runtime.model(torch.tensor([[5, 6]]))
    return x


def starts_threads(x, ctx):
    import threading

    threads = [threading.Thread(target=x.sum) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # one that stays for a while
    threading.Thread(target=threading.Event().wait, args=(5,), daemon=True).start()
    return x + 1


def starts_a_process(x, ctx):
    import subprocess

    assert subprocess.run(["echo", "a"], capture_output=True, text=True, check=True).stdout == "a\n"
    return x + 1


def forks(x, ctx):
    """A child that goes on as if it were the engine, and one that raises."""
    import os

    first = os.fork()
    if first:
        os.waitpid(first, 0)
        if os.fork() == 0:
            raise RuntimeError("in the child")
        os.wait()
    return x + 1


def hooks_while_it_fires(x, ctx):
    from flexkernel.engine import DOOR

    module = DOOR.runtime.model.model.layers[1].mlp
    handle = module.register_forward_hook(lambda _module, _args, out: out)
    DOOR.runtime.model.model.layers[2].mlp.register_forward_pre_hook(lambda _module, _args: None)
    handle.remove()
    return x + 1


def adds_a_module(x, ctx):
    from flexkernel.engine import DOOR

    model = DOOR.runtime.model
    model.extra = nn.Linear(2, 2)
    model.model.layers[3].extra = nn.Identity()
    del model.extra
    return x + 1


def sets_global_state(x, ctx):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    return x + 1


def engine_state():
    """(the default dtype, whether gradients are on in inference) of an engine between runs."""
    with torch.no_grad():
        return str(torch.get_default_dtype()), torch.is_grad_enabled()


def draws(x, ctx):
    torch.randn(5)
    torch.manual_seed(0)
    return x


def adds_noise(x, ctx):
    return x + torch.randn_like(x)


def fails_to_load(rank: int) -> None:
    """On an engine: its next load fails as a disk does."""
    from transformers import modeling_utils

    from flexkernel.engine import DOOR

    if DOOR.runtime.rank != rank:
        return
    real = modeling_utils.safe_open

    def fails(*_args, **_options):
        modeling_utils.safe_open = real
        raise OSError(5, "Input/output error")

    modeling_utils.safe_open = fails


def slow(x, ctx):
    import time

    time.sleep(2)
    return x


def note(path: str) -> None:
    """On an engine: one line more in a file."""
    with open(path, "a") as file:
        file.write("once\n")


# --- what engines tell of themselves --------------------------------------------------


def processes() -> list[Any]:
    """This process and all that it has started."""
    import psutil

    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def store_of_this_engine() -> str:
    from flexkernel.engine import DOOR

    return type(DOOR.runtime.store).__name__


def environ(name: str) -> str | None:
    import os

    return os.environ.get(name)


def raises_with_environment() -> None:
    import os

    there = dict(os.environ)
    raise ValueError(f"{len(there)} variables")
