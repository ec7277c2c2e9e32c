"""Thirty ways in which something goes wrong, each made on purpose: `python -m tools.faults
[--times 3] [number ...]`.

Prints a table (--write FILE: there, too): seconds until the user is told, seconds until a run
works again, what was loaded again, whether that run equals the one before, and what is left
behind. Ends with 1 where a bound is exceeded five times over, or an invariant is broken. FAULTS is
the table; a fault is a function that makes it on a bench, or runs alone with a cluster of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

import flexkernel as fk
from flexkernel import errors
from tests.support import models, on_engines
from tools import chaos

IDS = chaos.IDS
TIMEOUT_S = 2.0  # of the sessions while faults are made
PROMPT_S = 2.0  # bounds: until the error
AGAIN_S = 2.0  # until the next run has worked, where no process has ended
# and where a new one starts: it is forked, and taken in at the second beat of the controller
REPLACED_S = 5.0
STARTED_S = 15.0  # where a whole cluster does, by a process that has imported nothing yet
SILENT_S = TIMEOUT_S + 27.0  # until an engine that answers nothing any more is given up
FACTOR = 5  # how far a machine that is busy with other things may be beyond a bound
# what may come and go by itself: connections are made when they are first needed
MORE_FDS, MORE_THREADS = 6, 3
GATE, DOWN, MLP = (f"model.layers.1.mlp{end}" for end in (".gate_proj", ".down_proj", ""))


@dataclasses.dataclass
class Outcome:
    """Of one time that a fault was made. error_s: until the user was told; usable_s: from then
    until a run has worked. reloaded: the ranks whose weights are not where they were; left: what
    there is more of than before."""

    said: str
    error_s: float | None
    usable_s: float
    reloaded: list[int]
    equal: bool
    left: list[str]
    wrong: str = ""  # an invariant that does not hold


@dataclasses.dataclass
class Fault:
    """number: in the list of faults. make: on a bench; it marks when the fault happens. alone: by
    itself, with a cluster of its own. raises, says: what the user is told; none where nothing is
    to be seen."""

    number: str
    what: str
    make: Callable[[Bench], Any] | None = None
    alone: Callable[[Path], Outcome] | None = None
    raises: type[BaseException] | None = errors.EngineError
    says: str = ""
    rank: int | None = None  # who is to blame
    ends: tuple[int, ...] = ()  # the ranks whose process does
    error_s: float = PROMPT_S
    usable_s: float = AGAIN_S
    times: int = 3


class Bench:
    """A session over two engines with a model split over them, on which faults are made one after
    another."""

    def __init__(self, session: Any, folder: Path):
        self.session, self.folder, self.begin = session, folder, 0.0
        session.load(folder, tp=2)
        session.engines.timeout_s, session.engines.auto_restart = TIMEOUT_S, True
        self.break_once()
        self.logits, self.info = session.run(IDS).logits.tensor().clone(), session.loaded.info

    def break_once(self) -> None:
        """After a load, before anything is counted: the first new groups are more than a load
        makes."""
        with contextlib.suppress(errors.EngineError):
            chaos_at(1, MLP, "raise")(self)
        self.session.run(IDS).free()

    def mark(self) -> None:
        """Now it happens."""
        self.begin = time.monotonic()

    def run(self) -> Any:
        self.mark()
        return self.session.run(IDS)

    def strike(self, fault: Fault) -> Outcome:
        """Make a fault once, and see what it came to."""
        assert fault.make is not None
        session = self.session
        weights, before = session.on_ranks(on_engines.weights_at), holdings(session)
        told: BaseException | None = None
        self.mark()
        try:
            fault.make(self)
        except (
            errors.FlexError,
            KeyboardInterrupt,
            AssertionError,
        ) as error:  # the last: it is not as it should be
            told = error
        told_at = time.monotonic()
        error_s = told_at - self.begin if fault.raises else None
        middle = told_at if fault.raises else self.begin
        repr(session.status())
        status_s = time.monotonic() - told_at
        equal = torch.equal(session.run(IDS).logits.tensor(), self.logits)
        usable_s = time.monotonic() - middle
        session.on_ranks(chaos.ask_for, "")
        session.unhook()
        for run in session.runs:
            run.free()
        now = session.on_ranks(on_engines.weights_at)
        reloaded = [rank for rank, (a, b) in enumerate(zip(now, weights, strict=True)) if a != b]
        left = more(before, holdings(session, fault.ends), fault.ends)
        wrong = misread(fault, told)
        if status_s > FACTOR:
            wrong = wrong or f"the status took {status_s:.1f} s"
        return Outcome(first_line(told), error_s, usable_s, reloaded, equal, left, wrong)


def misread(fault: Fault, told: BaseException | None) -> str:
    """What is wrong with what the user was told; "" if nothing is."""
    if fault.raises is None:
        return "" if told is None else f"an error: {''.join(traceback.format_exception(told))}"
    if not isinstance(told, fault.raises):
        return f"{fault.raises.__name__} was to be raised, not {told!r}"
    if not re.search(fault.says, str(told), re.DOTALL):
        return f"{fault.says!r} is not in {str(told)!r}"
    if fault.rank is not None and getattr(told, "rank", None) != fault.rank:
        return f"rank {fault.rank} is to blame, not {getattr(told, 'rank', None)}"
    return ""


def first_line(told: BaseException | None) -> str:
    return "" if told is None else (str(told).splitlines() or [type(told).__name__])[0]


# --- what there is --------------------------------------------------------------------


def family(root: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that this one has begun, and theirs, that have not ended."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def mine() -> tuple[int, int]:
    """On an engine: its descriptors and threads."""
    return psutil.Process().num_fds(), psutil.Process().num_threads()


def holdings(session: Any, ends: tuple[int, ...] = ()) -> dict[str, int]:
    """What a session has, by name. ends: ranks that are new, and are not compared."""
    driver = psutil.Process()
    found = {
        "processes": len(family()),
        "slabs": len([p for p in session.store.folder.iterdir() if p.suffix]),
    }
    found |= {"driver's descriptors": driver.num_fds(), "driver's threads": driver.num_threads()}
    for rank, (fds, threads) in enumerate(session.on_ranks(mine)):
        if rank not in ends:
            found |= {f"rank {rank}'s descriptors": fds, f"rank {rank}'s threads": threads}
    return found


def more(before: dict[str, int], after: dict[str, int], ends: tuple[int, ...] = ()) -> list[str]:
    """What there is more of than before."""
    grace = {"descriptors": MORE_FDS, "threads": MORE_THREADS, "slabs": 1}
    grown = {name: after[name] - before[name] for name in after}
    return [f"{n} {name}" for name, n in grown.items() if n > grace.get(name.split()[-1], 0)]


# --- faults on the bench --------------------------------------------------------------


def chaos_at(rank: int, at: str, kind: str) -> Callable[[Bench], Any]:
    """A fault point of the engines' own."""

    def make(bench: Bench) -> None:
        bench.session.on_ranks(chaos.ask_for, f"rank={rank},at={at},kind={kind}")
        bench.run()

    return make


def doing(function: Callable[..., Any], *args: Any) -> Callable[[Bench], Any]:
    """Prepare something on every engine, and run."""

    def make(bench: Bench) -> None:
        bench.session.on_ranks(function, *args)
        bench.run()

    return make


def editing(
    function: Callable, glob: str = MLP, per: str = "whole", **options: Any
) -> Callable[[Bench], Any]:
    """Run with an edit."""

    def make(bench: Bench) -> Any:
        bench.session.edit("fault", per)(function)
        bench.session.hook(glob, edit="fault", **options)
        try:
            return bench.run()
        finally:
            bench.session.unhook()

    return make


def fails_on_rank_1(x, _ctx):
    if on_engines.runtime().rank == 1:
        raise ZeroDivisionError("on this rank only")
    return x


def fails(_x, _ctx):
    raise ZeroDivisionError("on whichever rank")


def differs(x, _ctx):
    return x + 1 + on_engines.runtime().rank


def each_bad_value(bench: Bench) -> None:
    """One edit after another that returns what cannot take the activation's place; the last one's
    error is left."""
    bad = (
        lambda x, ctx: x[..., :1],
        lambda x, ctx: x.double(),
        lambda x, ctx: x.to("meta"),
        lambda x, ctx: (x,),
        lambda x, ctx: [x],
        lambda x, ctx: None,
    )
    for function in bad[:-1]:
        try:
            editing(function)(bench)
        except errors.EditError:
            continue
        raise AssertionError("a value that is not like the activation went by")
    editing(bad[-1])(bench)


def nan_by_an_edit(bench: Bench) -> None:
    run = editing(lambda x, ctx: x * float("nan"))(bench)
    assert any("NaN" in text for text in run.warnings), run.warnings


def other_hooks(bench: Bench) -> None:
    """Rank 1 has lost its hooks."""

    def lose() -> None:
        from flexkernel.wire import HookSet

        if on_engines.runtime().rank == 1:
            on_engines.runtime().part.hook_set = HookSet()

    bench.session.hook(MLP)
    bench.session.on_ranks(lose)
    try:
        bench.run()
    finally:
        bench.session.unhook()


def grow_and_die() -> None:
    """On an engine: as the system ends a process that has taken too much."""
    on_engines.runtime().hoard = torch.ones(400 << 20, dtype=torch.uint8)
    time.sleep(1.0)  # its memory is looked at four times a second
    os.kill(os.getpid(), signal.SIGKILL)


def stuck_in_two_groups() -> None:
    """On an engine: each rank waits in a group in which the other is not."""
    import torch.distributed as dist

    rt = on_engines.runtime()
    group = dist.new_group([0, 1], backend="gloo")
    rt.breaker.after_groups({rt.store_port})
    on_engines.once(
        MLP, rt.rank, lambda: dist.all_reduce(torch.zeros(1), group=group if rt.rank else None)
    )


def never_returns() -> None:
    """In C, without ever letting another thread run: neither the watch nor a signal's handler."""
    sum(range(10**15))


def press(bench: Bench, after_s: float, marks: bool = True) -> threading.Timer:
    """Ctrl-C, after a while."""

    def now() -> None:
        if marks:
            bench.mark()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after_s, now)
    timer.start()
    return timer


def interrupted(bench: Bench) -> None:
    bench.session.on_ranks(on_engines.sleep_at, "model.layers.2.mlp", 1)
    press(bench, 0.5)
    bench.run()


def interrupted_twice(bench: Bench) -> None:
    """Once in the run, once in what follows it, wherever that is by then."""
    bench.session.on_ranks(on_engines.sleep_at, "model.layers.2.mlp", 1)
    press(bench, 0.5)
    again = press(bench, 0.5 + random.uniform(0.02, 0.8), marks=False)
    try:
        bench.run()
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            again.join()


def interrupted_anywhere(bench: Bench) -> None:
    """A hundred times Ctrl-C at some moment of hooking and running; after each a run is right."""
    dice, done = random.Random(1), 0
    for _ in range(100):
        try:
            timer = press(bench, dice.uniform(0.0, 0.15))
            while timer.is_alive():
                bench.session.hook(MLP if dice.random() < 0.5 else DOWN)
                bench.session.run(IDS)
            time.sleep(1.0)
        except KeyboardInterrupt:
            done += 1
        assert torch.equal(bench.session.run(IDS).logits.tensor(), bench.logits), (
            f"after {done} interrupts"
        )
        bench.session.unhook()
    assert done == 100, f"{done} of 100 interrupts came"
    bench.mark()


def broken_off(bench: Bench) -> None:
    """The network between the ranks goes, seen from one side."""

    def cut() -> None:
        rt = on_engines.runtime()
        on_engines.once(MLP, 1, lambda: rt.breaker.break_groups())

    bench.session.on_ranks(cut)
    bench.run()


def controller_dies(bench: Bench) -> None:
    controller = bench.session.engines.ipcluster.controller.process
    for process in [controller, *controller.children(recursive=True)]:
        process.kill()
    bench.mark()
    bench.run()


OTHER = """
import sys, time, flexkernel as fk
attach = fk.attach  # imports torch, which a notebook that is open has done
begin = time.monotonic()
try:
    attach(cluster_id=sys.argv[1])
except fk.errors.ClusterError as error:
    print(time.monotonic() - begin, error)
"""


def second_notebook(bench: Bench) -> None:
    command = [sys.executable, "-c", OTHER, bench.session.engines.cluster_id]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seconds, _, text = out.partition(" ")
    bench.begin = time.monotonic() - float(seconds)
    raise errors.ClusterError(text.strip())


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of that size; only root can make one."""
    with tempfile.TemporaryDirectory() as where:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True
        )
        if made.returncode:
            raise Skipped("a small file system has to be mounted, which only root may")
        try:
            yield Path(where)
        finally:
            subprocess.run(["umount", "--lazy", where], check=True)


class Skipped(Exception):
    """A fault that this machine does not allow to be made."""


def disk_full(bench: Bench) -> None:
    """No capture, module or hook file is seen half."""
    session = bench.session
    session.hook(MLP)
    session.modules["probe"] = torch.nn.Linear(64, 64)
    session.edit("long")(lambda x, ctx: x)
    run = session.run(IDS)
    with small_disk("64k") as disk:
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        writers = [
            lambda: run[MLP].save(disk / "capture.safetensors"),
            lambda: session.modules.save(disk / "modules.safetensors"),
            lambda: session.hooks.save(disk / "hooks.json"),
        ]
        bench.mark()
        for write in writers:
            try:
                write()
            except errors.FlexError as error:
                told = error
            else:
                raise AssertionError("it was written to a full disk")
        half = [p.name for p in disk.iterdir() if p.name != "filler"]
        assert not half, half
    del session.modules["probe"]
    raise told


def half_written(bench: Bench) -> None:
    """Files that end in their middle are refused, and change nothing."""
    session = bench.session
    session.modules["probe"] = torch.nn.Linear(64, 64)
    with tempfile.TemporaryDirectory() as folder:
        modules = session.modules.save(Path(folder) / "modules.safetensors")
        hooks = session.hooks.save(Path(folder) / "hooks.json")
        for file in (modules, hooks):
            os.truncate(file, file.stat().st_size // 2)
        bench.mark()
        for read, path, kind in (
            (session.modules.load, modules, errors.LoadError),
            (session.hooks.load, hooks, errors.HookError),
        ):
            try:
                read(path)
            except kind as error:
                told = error
            else:
                raise AssertionError(f"half of {path.name} was read")
    del session.modules["probe"]
    raise told


def replaced_while_loaded(bench: Bench) -> None:
    """The checkpoint under a loaded model is cut off: what is loaded does not look at it any
    more."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(shutil.copytree(bench.folder, Path(parent) / "model"))
        bench.session.load(copy, tp=2)
        for file in copy.glob("*.safetensors"):
            os.truncate(file, 4096)
        bench.mark()
        assert torch.equal(bench.session.run(IDS).logits.tensor(), bench.logits)
    bench.session.load(bench.folder, tp=2)
    bench.break_once()


def truncated_checkpoint(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(shutil.copytree(bench.folder, Path(parent) / "model"))
        for file in copy.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)
        bench.mark()
        bench.session.load(copy, tp=2)


def heads_that_do_not_divide(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(shutil.copytree(bench.folder, Path(parent) / "model"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
        bench.mark()
        bench.session.load(copy, tp=2)


# --- faults with a cluster of their own -----------------------------------------------


DRIVER = """
import sys, time, flexkernel as fk
session = fk.start(2, keep=sys.argv[2] == "keep")
session.load(sys.argv[1], tp=2)
session.hook("model.layers.*.mlp")
run = session.run([[1, 2, 3]])
norm = float(run["model.layers.1.mlp"].norm())
print(session.engines.cluster_id, session.store.folder, norm, flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def other_driver(
    folder: Path, how: str
) -> Iterator[tuple[subprocess.Popen, list[psutil.Process], list[str]]]:
    """Another notebook with engines of its own: its process, those of its cluster, and what it
    says."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        words = driver.stdout.readline().split()
        assert words, "the other driver did not start"
        processes = [
            p
            for p in family(psutil.Process(driver.pid))
            if "flexkernel.cluster.reaper" not in p.cmdline()
        ]
        assert len(processes) >= 4
        yield driver, processes, words
    finally:
        driver.kill()
        driver.wait()


def still_there(processes: list[psutil.Process], folder: str | Path) -> list[str]:
    alive = psutil.wait_procs(processes, 10)[1]
    end = time.monotonic() + 10
    while os.path.exists(folder) and time.monotonic() < end:
        time.sleep(0.1)
    return [f"process {p.pid}" for p in alive] + [f"{folder}"] * os.path.exists(folder)


def kernel_restarts(folder: Path) -> Outcome:
    """Of a kept cluster: another kernel finds model, hooks and runs."""
    with other_driver(folder, "keep") as (driver, processes, (cluster_id, slabs, norm)):
        driver.kill()
        driver.wait()
        begin = time.monotonic()
        with fk.attach(cluster_id=cluster_id) as session:
            attach_s = time.monotonic() - begin
            name = "model.layers.1.mlp"
            stored = float(session.runs[0][name].norm()) == float(norm)
            now = float(session.run([[1, 2, 3]])[name].norm())
            usable_s = time.monotonic() - begin
            wrong = (
                "" if stored and len(session.hooks) == 1 else "hooks or runs are not found again"
            )
            if attach_s > FACTOR * 1.0:
                wrong = f"attaching took {attach_s:.1f} s"
            session.close(end=True)
    return Outcome("", None, usable_s, [], now == float(norm), still_there(processes, slabs), wrong)


def driver_goes(folder: Path) -> Outcome:
    """Of an owned cluster: its processes go, however its notebook ended; and its id can be used
    again."""
    with other_driver(folder, "own") as (driver, processes, (cluster_id, slabs, _)):
        driver.kill()
        begin = time.monotonic()
        alive = psutil.wait_procs(processes, 30)[1]
        gone_s = time.monotonic() - begin
        left = still_there(alive, slabs)
        begin = time.monotonic()
        with fk.start(2, cluster_id=cluster_id) as session:  # beside what the dead one left
            session.load(folder, tp=2)
            session.run(IDS)
            usable_s = time.monotonic() - begin
    return Outcome("", gone_s, usable_s, [0, 1], True, left)


def stale_file(folder: Path) -> Outcome:
    """A cluster's file whose processes are gone."""
    with other_driver(folder, "keep") as (driver, processes, (cluster_id, slabs, _)):
        driver.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        begin, said = time.monotonic(), ""
        try:
            fk.attach(cluster_id=cluster_id)
        except errors.ClusterError as error:
            said = first_line(error)
        error_s = time.monotonic() - begin
        with fk.start(2) as session:  # which sweeps what the dead one left in memory
            session.load(folder, tp=2)
            session.run(IDS)
            usable_s = time.monotonic() - begin
            left = still_there([], slabs)
    wrong = "" if "not running any more" in said else f"attaching to it said {said!r}"
    return Outcome(said, error_s, usable_s, [0, 1], True, left, wrong)


def stop_with_stuck_engines(folder: Path) -> Outcome:
    """One in C code that never returns, one stopped by a signal."""
    others, slabs = {process.pid for process in family()}, ""
    session = fk.start(2)
    processes = [process for process in family() if process.pid not in others]
    try:
        session.engines.timeout_s = TIMEOUT_S
        session.load(folder, tp=2)
        slabs = str(session.store.folder)
        session.on_ranks(on_engines.act_at, MLP, 0, never_returns)
        session.on_ranks(on_engines.die_at, MLP, 1, signal.SIGSTOP)
        press_after = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        press_after.start()
        with contextlib.suppress(KeyboardInterrupt, errors.EngineDied):
            session.run(IDS)
    finally:
        begin = time.monotonic()
        session.close()
    stop_s = time.monotonic() - begin
    return Outcome("", stop_s, 0.0, [], True, still_there(processes, slabs))


def slabs_full(_folder: Path) -> Outcome:
    """Memory for slabs runs out between two runs."""
    with small_disk("24m") as disk:
        before = os.environ.get("FLEX_SLABS")
        os.environ["FLEX_SLABS"] = str(disk)
        try:
            with fk.start(2) as session:
                return fill(session, _folder, disk)
        finally:
            os.environ.pop("FLEX_SLABS")
            if before is not None:
                os.environ["FLEX_SLABS"] = before


def fill(session: Any, folder: Path, disk: Path) -> Outcome:
    session.load(folder, tp=2)
    session.hook(MLP)
    run = session.run(IDS).keep()
    value, logits = run[MLP].tensor().clone(), run.logits.tensor().clone()
    weights = session.on_ranks(on_engines.weights_at)
    session.hook("model.layers.*")
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max((free.f_bavail - 16) * free.f_frsize, 0))
    begin, said, wrong = time.monotonic(), "", "it was captured into memory that is not there"
    try:
        session.run([[5] * 500] * 8)
    except errors.MemoryBudgetError as error:
        said, wrong = first_line(error), ""
    error_s = time.monotonic() - begin
    (disk / "filler").unlink()
    session.unhook("model.layers.*")
    equal = torch.equal(session.run(IDS).logits.tensor(), logits) and torch.equal(
        run[MLP].tensor(), value
    )
    usable_s = time.monotonic() - begin - error_s
    kept = session.on_ranks(on_engines.weights_at) == weights
    return Outcome(said, error_s, usable_s, [] if kept else [0, 1], equal, [], wrong)


# --- the table ------------------------------------------------------------------------

DIED = errors.EngineDied
NO_PROGRESS = {"error_s": TIMEOUT_S + PROMPT_S, "says": "no progress for 2 s", "rank": 1}
ENDS_1 = {"raises": DIED, "rank": 1, "ends": (1,), "usable_s": REPLACED_S}

FAULTS = [
    Fault(
        "1",
        "SIGKILL in a forward",
        chaos_at(1, MLP, "kill"),
        says="SIGKILL.*last in model.layers.1",
        **ENDS_1,
    ),
    Fault(
        "2a",
        "SIGABRT in a forward",
        chaos_at(1, MLP, "abort"),
        says="SIGABRT.*Fatal Python error",
        **ENDS_1,
    ),
    Fault(
        "2b",
        "SIGSEGV in a forward",
        chaos_at(1, MLP, "segv"),
        says="SIGSEGV.*Fatal Python error",
        **ENDS_1,
    ),
    Fault(
        "2c",
        "SIGBUS in a forward",
        doing(on_engines.die_at, MLP, 1, signal.SIGBUS),
        says="SIGBUS",
        **ENDS_1,
    ),
    Fault(
        "3",
        "killed as for want of memory",
        doing(on_engines.act_at, MLP, 1, grow_and_die),
        says=r"probably out of memory.*last RSS \d\.\d\d GB",
        **(ENDS_1 | {"error_s": 1.0 + PROMPT_S}),
    ),
    Fault("4", "out of memory on one rank", chaos_at(1, MLP, "oom"), says="memory", rank=1),
    Fault(
        "5",
        "an edit raises on one rank",
        editing(fails_on_rank_1, GATE, "element"),
        raises=errors.EditError,
        says="on this rank only",
        rank=1,
    ),
    Fault(
        "6",
        "an edit raises on all ranks",
        editing(fails, GATE, "element"),
        raises=errors.EditError,
        says="on whichever",
    ),
    Fault(
        "7",
        "an edit returns another shape, dtype, device, a tuple, a list, nothing",
        each_bad_value,
        raises=errors.EditError,
    ),
    Fault("8", "an edit makes NaN", nan_by_an_edit, raises=None),
    Fault(
        "9",
        "an edit differs between copies",
        editing(differs, MLP, "element"),
        raises=errors.EditError,
        says="per='whole'",
    ),
    Fault(
        "10",
        "hooks differ between ranks",
        other_hooks,
        raises=errors.HookError,
        says="rank 1 has other hooks",
    ),
    Fault("11", "a rank sleeps, others wait for it", chaos_at(1, MLP, "sleep"), **NO_PROGRESS),
    Fault("12a", "a rank loops in Python", chaos_at(1, MLP, "loop"), **NO_PROGRESS),
    Fault(
        "12b",
        "a rank is in C for ever and lets no thread run",
        doing(on_engines.act_at, MLP, 1, never_returns),
        says="did not arrive: its engine .* hangs",
        times=1,
        **(ENDS_1 | {"error_s": SILENT_S}),
    ),
    Fault(
        "13",
        "all ranks wait, in different groups",
        doing(stuck_in_two_groups),
        error_s=TIMEOUT_S + PROMPT_S,
        says="waited in",
    ),
    Fault(
        "14",
        "SIGSTOP",
        chaos_at(1, MLP, "stop"),
        says="was stopped by a signal",
        times=1,
        **(ENDS_1 | {"error_s": SILENT_S}),
    ),
    Fault("15", "Ctrl-C in a forward", interrupted, raises=KeyboardInterrupt),
    Fault(
        "16", "a second Ctrl-C while the ranks recover", interrupted_twice, raises=KeyboardInterrupt
    ),
    Fault(
        "17",
        "the kernel of a kept cluster restarts",
        alone=kernel_restarts,
        raises=None,
        usable_s=2.0,
        times=1,
    ),
    Fault(
        "18",
        "a second notebook attaches",
        second_notebook,
        raises=errors.ClusterError,
        says="another notebook has",
    ),
    Fault("19", "the controller is killed", controller_dies, raises=None, usable_s=5.0),
    Fault(
        "20", "the driver is killed", alone=driver_goes, error_s=6.0, usable_s=STARTED_S, times=1
    ),
    Fault(
        "21", "the network between ranks goes", broken_off, says="lost the connections between them"
    ),
    Fault(
        "22",
        "the rank of the rendezvous store is killed",
        chaos_at(0, MLP, "kill"),
        says="SIGKILL",
        **(ENDS_1 | {"rank": 0, "ends": (0,)}),
    ),
    Fault("23", "a file of a cluster that is gone", alone=stale_file, usable_s=STARTED_S, times=1),
    Fault(
        "24",
        "the disk is full while captures, modules and hooks are saved",
        disk_full,
        raises=errors.FlexError,
    ),
    Fault("25", "half of a file of modules or hooks", half_written, raises=errors.FlexError),
    Fault("26", "memory for slabs runs out", alone=slabs_full, times=1),
    Fault(
        "27a",
        "the checkpoint is cut off under a loaded model",
        replaced_while_loaded,
        raises=None,
        ends=(0, 1),
    ),
    Fault(
        "27b", "the checkpoint to load is cut off", truncated_checkpoint, raises=errors.LoadError
    ),
    Fault(
        "28", "tp does not divide the heads", heads_that_do_not_divide, raises=errors.LayoutError
    ),
    Fault("29", "Ctrl-C at a hundred moments", interrupted_anywhere, raises=None, times=1),
    Fault(
        "30",
        "stop while all engines are stuck",
        alone=stop_with_stuck_engines,
        error_s=5.0,
        times=1,
    ),
]


def repeated(fault: Fault, times: int, once: Callable[[], Outcome]) -> list[Outcome]:
    return [once() for _ in range(min(times, fault.times))]


def broken(fault: Fault, outcomes: list[Outcome], factor: int = FACTOR) -> list[str]:
    """Which bounds and invariants do not hold, by medians of the times and each of the rest.
    factor: how often the bounds may be exceeded."""
    wrong = [o.wrong for o in outcomes if o.wrong]
    error_s, usable_s = medians(outcomes)
    if error_s is not None and error_s > fault.error_s * factor:
        wrong.append(f"{error_s:.1f} s until the error, the bound is {fault.error_s:g}")
    if usable_s > fault.usable_s * factor:
        wrong.append(f"{usable_s:.1f} s until usable, the bound is {fault.usable_s:g}")
    if not all(o.equal for o in outcomes):
        wrong.append("the next run differs")
    if fault.make is not None and any(set(o.reloaded) != set(fault.ends) for o in outcomes):
        wrong.append(
            f"weights were loaded again on ranks {outcomes[0].reloaded}, not on {list(fault.ends)}"
        )
    return wrong + [f"left behind: {', '.join(o.left)}" for o in outcomes if o.left]


def medians(outcomes: list[Outcome]) -> tuple[float | None, float]:
    told = [o.error_s for o in outcomes if o.error_s is not None]
    return (statistics.median(told) if told else None), statistics.median(
        o.usable_s for o in outcomes
    )


def row(fault: Fault, outcomes: list[Outcome], wrong: list[str]) -> str:
    error_s, usable_s = medians(outcomes)
    ranks = outcomes[0].reloaded
    cells = [
        fault.number,
        fault.what,
        "nothing to see" if error_s is None else f"{error_s:.2f}",
        f"{usable_s:.2f}",
        "no" if not ranks else "all" if len(ranks) > 1 else f"rank {ranks[0]}'s part",
        "equal" if all(o.equal for o in outcomes) else "DIFFERS",
        ", ".join(dict.fromkeys(thing for o in outcomes for thing in o.left)) or "nothing",
        re.sub(rf"{tempfile.gettempdir()}/\w+", "...", outcomes[0].said)[:90].replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |" + (f" <!-- {'; '.join(wrong)} -->" if wrong else "")


ABOUT = """# Faults

Written by `make faults`: each fault is made on purpose over two engines with a small model, some of them several times,
and the times are medians. A bound that is exceeded, and whatever else is not as it should be, stands below the table.
"""
HEAD = """| | fault | s to the error | s until usable | loaded again | next run | left behind | what is said |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def chosen(numbers: list[str]) -> list[Fault]:
    """Those of these numbers ("2" means 2a, 2b and 2c); all if there are none."""
    return [
        f for f in FAULTS if not numbers or f.number in numbers or f.number.rstrip("abc") in numbers
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    lines: list[str] = []
    failed, beyond = [], []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, flexkernel "
        f"{fk.__version__}\n"
    )
    say(HEAD)
    with tempfile.TemporaryDirectory() as where:
        folder = models.tiny("llama", where)
        on_bench = [f for f in chosen(args.numbers) if f.make is not None]
        with fk.start(2) if on_bench else contextlib.nullcontext() as session:
            bench = Bench(session, folder) if on_bench else None
            for fault in chosen(args.numbers):
                try:
                    make = (
                        (lambda f=fault: f.alone(folder))
                        if fault.alone
                        else (lambda f=fault: bench.strike(f))
                    )
                    outcomes = repeated(fault, args.times, make)
                except Skipped as why:
                    say(f"| {fault.number} | {fault.what} | not made: {why} | | | | | |")
                    continue
                wrong = broken(fault, outcomes)
                say(row(fault, outcomes, wrong))
                failed += [f"{fault.number} {fault.what}: {text}" for text in wrong]
                beyond += [
                    f"{fault.number} {fault.what}: {text}"
                    for text in broken(fault, outcomes, 1)
                    if not wrong
                ]
    said = "\n".join(f"- {text}" for text in [*failed, *beyond])
    say(f"\n{said}" if said else "\nEvery bound and invariant holds.")
    if args.write is not None:
        args.write.write_text("\n".join([ABOUT, *lines]) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    from tools import faults  # engines import what is sent to them by name

    sys.exit(faults.main())
