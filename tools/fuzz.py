"""Whatever comes in, a sentence of ours goes out: headers of the data plane and of files, magics'
lines, cluster files.

`python -m tools.fuzz --seconds 600 [--seed S] [TARGET ...]` tries inputs by turns and prints how
many; one that breaks something is shown as short as hypothesis can make it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a word that looks like a hub id is not asked for

import torch
import zmq
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from IPython.core.completer import CompletionContext
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import flexkernel as fk
from flexkernel.engine.model import checkpoint
from flexkernel.errors import FlexError, HookError, LoadError
from flexkernel.memory import client
from flexkernel.memory.channel import DTYPES
from flexkernel.memory.client import Client
from flexkernel.memory.server import OPS, Server
from flexkernel.names import match, nearest, select
from flexkernel.notebook import lines, magics
from flexkernel.session import hookfile
from flexkernel.wire import Region
from tests.support import models

TOKEN = "a-token"
IDS = [[5, 6, 7]]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**31, 2**63, -1]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@dataclasses.dataclass
class World:
    """What the checks need, made once: a shell with a small model on it, a data server, a
    folder."""

    folder: Path
    shell: Any
    session: Any
    server: Any
    logits: torch.Tensor


@contextlib.contextmanager
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "served").mkdir(mode=0o700)
        (path / "served" / "a.slab").write_bytes(bytes(4096))
        config = Config()
        config.HistoryManager.enabled = False
        InteractiveShell.clear_instance()
        shell = InteractiveShell.instance(config=config)
        shell.run_line_magic("load_ext", "flexkernel")
        session = shell.run_line_magic("flex_cluster", "local")
        shell.run_line_magic("flex_load", str(models.reading_bytes("llama", path / "model")))
        shell.push({"ids": IDS, "text": "abc", "number": 7, "none": None})
        with Server(path / "served", TOKEN) as server:
            yield World(path, shell, session, server, session.run(IDS).logits.tensor().clone())
        session.close()
        InteractiveShell.clear_instance()


# --- names ----------------------------------------------------------------------------

GLOBS = st.lists(
    st.sampled_from(["**", "*", "model", "layers", "0", "mlp", "@q", "a*b", "", "***", "m*"])
    | st.text(max_size=6)
)


def a_glob(world: World, parts: list[str]) -> None:
    """It names something or is refused, at once."""
    glob, begin = ".".join(parts), time.monotonic()
    try:
        found = select(glob, world.session.loaded.info.names)
        assert found and all(match(glob, name) for name in found)
    except HookError as error:
        assert "no module matches" in str(error)
    nearest(glob, world.session.loaded.info.names)
    assert time.monotonic() - begin < 5


# --- the data plane -------------------------------------------------------------------

ARGS = [
    *(
        "start",
        "num_bytes",
        "index",
        "narrow",
        "name",
        "dims",
        "keepdim",
        "rows",
        "cols",
        "height",
        "width",
        "how",
    ),
    *("lo", "hi", "bins", "k", "largest", "offset", "slabs", "region"),
]
REQUESTS = st.fixed_dictionaries(
    {"token": st.just(TOKEN), "op": st.sampled_from(sorted(OPS)) | JSON},
    optional={
        "slab": st.just("a.slab") | JSON,
        "offset": st.integers(0, 16) | JSON,
        "shape": st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**62]), max_size=4) | JSON,
        "dtype": st.sampled_from(sorted(DTYPES)) | JSON,
        "args": st.dictionaries(st.sampled_from(ARGS), st.integers(-2, 9) | JSON, max_size=6)
        | JSON,
        "id": JSON,
    },
)


def a_request(world: World, requests: list[dict]) -> None:
    """With the token each is answered, and the server goes on."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(world.server.address)
        for request in requests:
            dealer.send(json.dumps(request).encode())
        for _ in requests:
            assert dealer.poll(10_000), requests
            assert json.loads(dealer.recv_multipart()[0])["status"] in ("ok", "error")


def frames(world: World, parts: list[bytes]) -> None:
    """Without it nothing is answered; the next who has it is."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 100
        dealer.connect(world.server.address)
        dealer.send_multipart(parts or [b""])
    with Client(world.server.address, TOKEN, timeout_s=10) as reader:
        assert reader.read(Region("a.slab", 0, (3,), "uint8")).tolist() == [0, 0, 0]


class Frame:
    """As zmq has one."""

    def __init__(self, data: bytes):
        self.buffer = memoryview(data)


FORMS = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.lists(st.integers(-2, 4) | st.sampled_from([2**31, 2**62]), max_size=5) | JSON,
        "dtype": st.sampled_from(sorted(DTYPES)) | JSON,
        "num_bytes": JSON,
    },
)
ANSWERS = st.fixed_dictionaries(
    {"status": st.sampled_from(["ok", "error"]) | JSON},
    optional={
        "tensors": st.lists(FORMS, max_size=3) | JSON,
        "id": JSON,
        "type": JSON,
        "message": JSON,
    },
)


def an_answer(world: World, header: Any, buffers: list[bytes]) -> None:
    """What another process answers is a tensor as it says, or a sentence."""
    answer = [
        Frame(header if isinstance(header, bytes) else json.dumps(header).encode()),
        *map(Frame, buffers),
    ]
    client._number(answer)
    try:
        for tensor, raw in zip(client._unpack(answer), buffers, strict=True):
            assert tensor.nbytes == len(raw)
    except FlexError as error:
        assert str(error) or header.get("message") == ""
    except (IndexError, TypeError, ValueError) as error:  # which a server tells of as they are
        assert header["type"] == type(error).__name__ and str(error) == str(header.get("message"))


# --- files ----------------------------------------------------------------------------

ENTRIES = st.dictionaries(
    st.text(max_size=5),
    st.fixed_dictionaries(
        {"data_offsets": st.lists(st.integers(0, 99), min_size=2, max_size=2) | JSON}
    )
    | JSON,
    max_size=3,
)


def a_checkpoint(world: World, header: Any, length: int | None, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = world.folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + rest)
    try:
        checkpoint.check_file(path)
    except LoadError as error:
        assert str(path) in str(error)


def an_index(world: World, content: Any) -> None:
    path = world.folder / "index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        assert all(
            isinstance(name, str) and ".." not in Path(name).parts
            for name in checkpoint.named(path)
        )
    except LoadError as error:
        assert str(path) in str(error)


HOOK = st.dictionaries(
    st.sampled_from(
        [
            "glob",
            "at",
            "index",
            "name",
            "groups",
            "positions",
            "edit",
            "value",
            "heads",
            "capture",
            "x",
        ]
    ),
    st.sampled_from(["model.layers.*", "output", "zero", "after"]) | JSON,
)
EDIT = st.fixed_dictionaries(
    {},
    optional={
        "per": st.just("whole") | JSON,
        "source": st.just("def a(x, ctx):\n    return x") | st.text(max_size=20) | JSON,
        "imports": JSON,
    },
)
HOOKS = st.fixed_dictionaries(
    {"flexkernel hooks": st.just(hookfile.SCHEMA) | JSON},
    optional={
        "hooks": st.lists(HOOK, max_size=3) | JSON,
        "off": JSON,
        "edits": st.dictionaries(st.just("a") | st.text(max_size=3), EDIT, max_size=2) | JSON,
    },
)


def a_hook_file(world: World, content: Any) -> None:
    path = world.folder / "hooks.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = world.session.hooks.hook_set
    try:
        world.session.hooks.load(path)
        world.session.unhook()
    except FlexError:
        assert world.session.hooks.hook_set == before


CLUSTERS = st.fixed_dictionaries(
    {},
    optional={
        "cluster": st.fixed_dictionaries(
            {
                "class": st.just("ipyparallel.cluster.cluster.Cluster")
                | st.text("abc.", max_size=9)
                | JSON
            },
            optional={
                "cluster_id": JSON,
                "profile_dir": JSON,
                "n": JSON,
                "cluster_file": JSON,
                "delay": JSON,
            },
        )
        | JSON,
        "controller": st.fixed_dictionaries(
            {}, optional={"class": st.just("local") | JSON, "state": JSON}
        )
        | JSON,
        "engines": st.fixed_dictionaries(
            {}, optional={"class": st.just("flexkernel") | st.just("local") | JSON, "sets": JSON}
        )
        | JSON,
    },
)


def a_cluster_file(world: World, content: Any) -> None:
    home = world.folder / "ipython"
    security = home / "profile_default" / "security"
    security.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = security / "cluster-.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    before = os.environ.get("IPYTHONDIR")
    os.environ["IPYTHONDIR"] = str(home)
    try:
        fk.attach(profile="default")
        raise AssertionError("there is no such cluster")
    except FlexError as error:
        assert "no cluster to attach to" in str(error)
    finally:
        os.environ.pop("IPYTHONDIR") if before is None else os.environ.update(IPYTHONDIR=before)


# --- magics ---------------------------------------------------------------------------

LINES = [
    name for name in magics.FlexMagics.magics["line"] if name not in ("flex_cluster", "flex_verify")
]
EDITS = [
    "zero",
    "scale:2",
    "scale:",
    "clamp:-1,1",
    "add:ids",
    "patch:number",
    "noise:none",
    "mean:(",
    "nobody",
    "set:[1,2]",
]
LOSSES = [
    "next_token",
    "logits.mean()",
    "logits[",
    "nobody",
    "'a - b'",
    "tokens",
    "1/0",
    "captures['x']",
]
PLAIN = [
    "model.layers.*.mlp",
    "**",
    "lm_head",
    "ids",
    "text",
    "none",
    "g",
    "0",
    "-1",
    "0,-1",
    "3",
    "on",
    "off",
    "add",
]
PLAIN += [
    "remove",
    "list",
    "input",
    "output",
    "grad_output",
    "param_grad",
    "map",
    "logits",
    "after",
    "both",
    "1e400",
    "nan",
]
PLAIN += [
    "model.norm.weight",
    "**.@pattern",
    "'",
    '"',
    "{",
    "}",
    "{ids}",
    "{nobody}",
    "$text",
    "--",
    "-",
    "?",
    "\\",
    "=",
    "#",
]


def words(name: str) -> st.SearchStrategy[list[str]]:
    """What can stand in a magic's line, mostly: its own options, with and without values."""
    options = sorted(lines.options_of(getattr(magics.FlexMagics, name))) or ["--none"]
    told = st.tuples(st.sampled_from(options), st.sampled_from([*PLAIN, *EDITS, *LOSSES])).map(
        " ".join
    )
    glued = st.tuples(st.sampled_from(options), st.sampled_from(PLAIN)).map("=".join)
    return st.lists(told | glued | st.sampled_from(PLAIN) | st.text(max_size=6), max_size=5)


MAGICS = st.sampled_from(LINES).flatmap(lambda name: st.tuples(st.just(name), words(name)))
CELLS = (
    st.none()
    | st.text(max_size=30)
    | st.sampled_from(["x * 2", "return x", "x +", "a\nb", "\n\n", "ctx.save['a'] = 1\nx"])
)


def a_line(world: World, magic: tuple[str, list[str]], cell: str | None) -> None:
    """It does something, or says in a sentence why not; the model stays, and completion offers
    text."""
    name, parts = magic
    line = " ".join(part for part in parts if "\n" not in part)
    if name == "flex_load":
        line = line.replace(str(world.folder), "")  # not the model that is there: that would work
    shell, session, before = world.shell, world.session, list(world.session.runs)
    completion = shell.magics_manager.registry["FlexMagics"].completion
    session.engines.timeout_s = 60.0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if cell is not None and name in magics.FlexMagics.magics["cell"]:
                shell.run_cell_magic(name, line, cell)
            else:
                shell.run_line_magic(name, line)
        except (FlexError, UsageError) as error:
            assert str(error)
        typed = f"%{name} {line}"
        context = CompletionContext("", typed, len(typed), 0, 100)
        offers = completion.matcher(context)["completions"]
        assert all(isinstance(offer.text, str) for offer in offers)
    assert session.has_model
    for run in session.runs:
        if run not in before:
            run.free()
    session.unhook()


def still_right(world: World) -> None:
    assert torch.equal(world.session.run(IDS).logits.tensor(), world.logits)
    for run in world.session.runs:
        run.free()


# --- all of them ----------------------------------------------------------------------

TARGETS: dict[str, tuple[Callable, tuple]] = {
    "globs": (a_glob, (GLOBS,)),
    "requests": (a_request, (st.lists(REQUESTS, min_size=1, max_size=8),)),
    "frames": (frames, (st.lists(st.binary(max_size=300), max_size=5),)),
    "answers": (
        an_answer,
        (ANSWERS | JSON | st.binary(max_size=40), st.lists(st.binary(max_size=32), max_size=3)),
    ),
    "checkpoints": (
        a_checkpoint,
        (
            ENTRIES | JSON | st.binary(max_size=99),
            st.none() | st.integers(0, 2**64 - 1),
            st.binary(max_size=99),
        ),
    ),
    "indexes": (
        an_index,
        (
            st.fixed_dictionaries(
                {
                    "weight_map": st.dictionaries(
                        st.text(max_size=3), st.text("./a", max_size=9) | JSON
                    )
                }
            )
            | JSON
            | st.binary(),
        ),
    ),
    "hook files": (a_hook_file, (HOOKS | JSON | st.binary(max_size=40),)),
    "cluster files": (a_cluster_file, (CLUSTERS | JSON | st.binary(max_size=40),)),
    "lines": (a_line, (MAGICS, CELLS)),
}


def attempt(world: World, target: str, examples: int, number: int) -> None:
    """So many inputs, by a seed; the first that breaks something is raised, made as short as can
    be."""
    check, strategies = TARGETS[target]

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.tuples(*strategies))
    def every(inputs: tuple) -> None:
        check(world, *inputs)

    every()
    still_right(world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    asked = parser.parse_args()
    targets, numbers, tried = (
        asked.targets or list(TARGETS),
        random.Random(asked.seed),
        dict.fromkeys(TARGETS, 0),
    )
    print("seed", asked.seed, flush=True)
    broken: list[str] = []
    with world() as there:
        end = time.monotonic() + asked.seconds
        while time.monotonic() < end and len(broken) < 10:
            for target in targets:
                try:
                    attempt(there, target, 200, numbers.randrange(1 << 30))
                except Exception as error:
                    broken.append(target)
                    notes = "\n".join(getattr(error, "__notes__", ()))
                    print(f"{target}: {type(error).__name__}: {error}\n{notes}", flush=True)
                tried[target] += 200
    print("\n".join(f"{target:<14} {count:>9,}" for target, count in tried.items() if count))
    print(f"{len(broken)} broken" if broken else "nothing found")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
