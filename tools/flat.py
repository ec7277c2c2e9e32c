"""The same cell again and again in a real kernel: memory, slabs, descriptors and threads stay as
they are.

`python -m tools.flat --runs 1000` prints how they went, and fails where something has grown. Each
cell hooks again, runs and ends in the run; every tenth draws a view.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_kernel

from tests.support import models

SETUP = """
%load_ext flexkernel
%flex_cluster start -n 2
%flex_load {folder} --tp 2
"""
CELL = """
%flex_hook model.layers.*.mlp --group {group}
run = flex.run([[5, 6, 7, {i}], [8, 9]])
{last}
"""
LAST = ("run", "run['model.layers.1.mlp'].show()")
GROWTH_MB = 20.0
FEW = 4  # descriptors or threads more or less: pools of threads fill when they are first needed
TIMEOUT_S = 300.0

Sample = dict[str, dict[str, float]]  # process → what → how much


@contextmanager
def kernel() -> Iterator[Any]:
    """A client of a kernel of its own, which ends with its engines."""
    manager, client = start_new_kernel(kernel_name="python3", env={**os.environ})
    try:
        yield client
        execute(client, "%flex_cluster stop")
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def execute(client: Any, code: str) -> dict[str, Any]:
    """The last result's data as a notebook gets it; an error is raised here."""
    asked = client.execute(code)
    found: dict[str, Any] = {}
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            message = client.get_iopub_msg(timeout=max(until - time.monotonic(), 0.1))
        except queue.Empty:
            raise TimeoutError(f"no end of the cell within {TIMEOUT_S:g} s: {code}") from None
        if message["parent_header"].get("msg_id") != asked:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind in ("execute_result", "display_data"):
            found = content["data"]
        elif kind == "error":
            raise RuntimeError("\n".join(content["traceback"]))
        elif kind == "status" and content["execution_state"] == "idle":
            client.get_shell_msg(timeout=TIMEOUT_S)
            return found


class Watched:
    """The processes of a kernel's session, and where its slabs are."""

    def __init__(self, client: Any):
        told = execute(
            client, "import os; (os.getpid(), flex.engines.pids, str(flex.store.folder))"
        )["text/plain"]
        driver, engines, folder = eval(told)
        self.folder = Path(folder)
        self.processes = {"driver": psutil.Process(driver)}
        self.processes |= {
            f"engine {rank}": psutil.Process(pid) for rank, pid in enumerate(engines)
        }
        for child in self.processes["driver"].children(recursive=True):
            if "ipyparallel.controller" in " ".join(child.cmdline()):
                self.processes["controller"] = child
                break

    def sample(self) -> Sample:
        found: Sample = {}
        for name, process in self.processes.items():
            with process.oneshot():
                rss, fds, threads = (
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                )
            found[name] = {"MB": rss / 1e6, "fds": fds, "threads": threads}
        files = [path for path in self.folder.iterdir() if path.suffix == ".slab"]
        found["slabs"] = {
            "files": len(files),
            "MB": sum(path.stat().st_size for path in files) / 1e6,
        }
        return found


def repeated(
    folder: Path, runs: int, every: int, limit_s: float = math.inf
) -> list[tuple[int, Sample]]:
    """(how many runs, sample) after each `every` runs. limit_s: after so many seconds it ends with
    the next sample."""
    samples: list[tuple[int, Sample]] = []
    begin = time.monotonic()
    with kernel() as client:
        execute(client, SETUP.format(folder=folder))
        watched = Watched(client)
        for i in range(1, runs + 1):
            if len(samples) > 1 and samples[-1][0] == i - 1 and time.monotonic() - begin > limit_s:
                runs = i - 1
                break
            shown = execute(
                client, CELL.format(i=10 + i % 200, group=f"g{i % 2}", last=LAST[i % 10 == 0])
            )
            assert "text/plain" in shown, "the cell has a result"
            if i % every == 0:
                samples.append((i, watched.sample()))
        stored = execute(client, "len(flex.runs), len(flex.hooks)")["text/plain"]
        assert eval(stored) == (min(runs, 100), 1), stored
    return samples


def grown(samples: list[tuple[int, Sample]], warm: int, growth_mb: float = GROWTH_MB) -> list[str]:
    """What is not as it was after the first `warm` runs."""
    base = next(sample for runs, sample in samples if runs >= warm)
    wrong = []
    for runs, sample in samples:
        for name, numbers in sample.items() if runs > warm else ():
            for what, number in numbers.items():
                most = growth_mb if what == "MB" else 0 if name == "slabs" else FEW
                if number - base[name][what] > most:
                    wrong.append(
                        f"{name}: {base[name][what]:.0f} {what} after {warm} runs, {number:.0f} "
                        f"after {runs}"
                    )
    return wrong


def table(samples: list[tuple[int, Sample]]) -> str:
    """Markdown: a row a sample; each cell MB / descriptors / threads, or files / MB of slabs."""
    names = list(samples[0][1])
    lines = [f"| runs | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for runs, sample in samples:
        cells = [" / ".join(f"{number:.0f}" for number in sample[name].values()) for name in names]
        lines.append(f"| {runs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = repeated(models.tiny("llama", folder), asked.runs, max(asked.runs // 20, 1))
    print(table(samples))
    wrong = grown(samples, min(50, asked.runs // 2))
    print("\n".join(wrong) or "nothing has grown")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
