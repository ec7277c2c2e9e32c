"""The nursery: a process that has imported what every engine imports, and forks engines that have
it from their start.

Importing torch and transformers takes seconds of a core for each engine, and the files from a
network's disk for each; forked, all share what one process has read, and one in a dead one's place
is there in a moment. The way is that of Android's zygote and of multiprocessing's forkserver; here
what is forked belongs to nobody's `multiprocessing`, and may outlive the driver.

A driver has one, beside its engines; it ends with the driver, or when it has had none of them for
ten minutes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environment import inherited

__all__ = ["FORKED", "ForkRequest", "ForkServer", "fork_server"]

READY_S = 120.0  # what the imports may take; then each engine makes its own
FORK_S = 30.0
GIVEN_UP_S = 30.0  # how often who waits for an end is asked whether he still does
IDLE_S = 600.0
FORKED = "flex-engine"  # the name of what was forked
# What may differ between two engines of one nursery: nothing reads it while it is imported
LATER = ("FLEX_", "IPP_", "TORCHINDUCTOR_")


@dataclass(frozen=True)
class ForkRequest:
    """What a forked process is to run: a module, as `python -m` would."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str  # where it works
    log: str
    stays: bool  # it outlives the driver


# --- in the driver --------------------------------------------------------------------


class ForkServer:
    """The driver's end of one. environment: what all that it forks have of the driver's, and it
    itself while it imports the modules."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]):
        self.environment = inherited(environment)
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flexkernel.cluster.environment",
                "-m",
                __name__,
                str(theirs.fileno()),
                *modules,
            ],
            env=self.environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the driver's terminal is not for it
        )
        theirs.close()
        self.driver = os.getpid()
        self._turn = threading.Lock()
        self._heard = threading.Condition()
        self._ready: bool | None = None
        # it has been ready; it never was, and another would not be either
        self._forks = self.unfit = False
        self._asked: set[int] = set()  # the orders whose pids are waited for
        self._forked: dict[int, int | None] = {}  # order → pid
        self._ended: dict[int, int] = {}  # pid → exit code
        self._numbers = itertools.count()
        threading.Thread(target=self._listen, name="flexkernel-nursery", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def there(self) -> bool:
        return self._process.poll() is None and self._ready is not False

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether what it forks is as if it had been started with this environment."""
        return same(self.environment, environment)

    def fork(self, order: ForkRequest) -> int | None:
        """The pid of a process that runs this. None: it cannot fork, and the process has to be
        started by itself."""
        with self._heard:
            if not self._heard.wait_for(lambda: self._ready is not None, READY_S):
                self._process.kill()
                self._ready = False
            if not self._ready:
                self.unfit |= not self._forks
                return None
            self._forks, number = True, next(self._numbers)
            self._asked.add(number)
        try:
            with self._turn, contextlib.suppress(OSError):
                self._control.sendall(
                    json.dumps({"number": number, **asdict(order)}).encode() + b"\n"
                )
            with self._heard:
                self._heard.wait_for(lambda: number in self._forked or not self._ready, FORK_S)
                return self._forked.pop(number, None)
        finally:
            with self._heard:
                self._asked.discard(number)
                _end(self._forked.pop(number, None))  # of an interrupt

    def wait(self, pid: int, given_up: Callable[[], bool]) -> int | None:
        """The exit code of what it has forked, once that has ended, minus a signal's number. None:
        the nursery has gone before, or whoever waits gives up."""
        with self._heard:
            while pid not in self._ended and self._ready and not given_up():
                self._heard.wait(GIVEN_UP_S)
            return self._ended.pop(pid, None)

    def retire(self) -> None:
        """Have it end when all that it has forked has ended."""
        with contextlib.suppress(OSError):
            self._control.sendall(b"{}\n")

    def _listen(self) -> None:
        try:
            with contextlib.suppress(OSError), self._control.makefile("r") as lines:
                for line in lines:
                    with self._heard:
                        self._note(json.loads(line))
                        self._heard.notify_all()
        finally:
            with self._heard:
                self._ready = False
                self._heard.notify_all()
        self._process.wait()

    def _note(self, said: dict[str, Any]) -> None:
        if "ready" in said:
            self._ready = said["ready"]
        elif "number" not in said:
            self._ended[said["pid"]] = said["code"]
        elif said["number"] in self._asked:
            self._forked[said["number"]] = said["pid"]
        else:  # nobody would know that it is there
            _end(said["pid"])


def _end(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    def told(environment: Mapping[str, str]) -> dict[str, str]:
        return {
            name: value
            for name, value in inherited(environment).items()
            if not name.startswith(LATER)
        }

    return told(one) == told(other)


_fork_server: ForkServer | None = None


def fork_server(modules: Sequence[str], environment: Mapping[str, str]) -> ForkServer | None:
    """This driver's, begun if there is none for that environment. None: processes cannot be forked
    here."""
    global _fork_server
    if sys.platform != "linux":  # elsewhere the system's own libraries forbid it
        return None
    # that of the process that this one was forked from
    if _fork_server is not None and _fork_server.driver != os.getpid():
        _fork_server = None
    if _fork_server is None or not _fork_server.suits(environment):
        if _fork_server is not None:
            _fork_server.retire()
        _fork_server = ForkServer(modules, environment)
    elif _fork_server.unfit:
        return None
    elif not _fork_server.there:
        _fork_server = ForkServer(modules, environment)
    return _fork_server


# --- in the nursery -------------------------------------------------------------------


def main() -> None:
    os.umask(0o077)
    control = socket.socket(fileno=int(sys.argv[1]))
    with ending_with(control):
        for name in sys.argv[2:]:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, what all share
    control.sendall(json.dumps({"ready": not (why := unfit()), "why": why}).encode() + b"\n")
    order = serve(control) if not why else None
    if order is not None:
        become(order)


@contextlib.contextmanager
def ending_with(control: socket.socket) -> Any:
    """Within it this process ends where its driver does: that says nothing before it hears that
    all is ready, so that any news is that it has gone."""
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    # news is a SIGIO, whose default is the end
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        if selector.select(0):  # it came before
            sys.exit()
    yield
    fcntl.fcntl(control, fcntl.F_SETFL, flags)


def unfit() -> str:
    """Why what this process would fork could not be relied on, "": it could. Other threads do not
    come along, and hold what they hold for ever; a GPU's driver does not work in a process that
    was forked after its first use."""
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        return f"{num_threads} threads"
    return next((f"{file} is open" for file in opened() if file.startswith("/dev/nvidia")), "")


def opened() -> list[str]:
    """The files that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the look itself has gone already
            found.append(os.readlink(path))
    return found


def serve(control: socket.socket) -> ForkRequest | None:
    """Fork at each order, and tell how what was forked ends. In what is forked the order; None
    once all is over."""
    alarm, bell = socket.socketpair()
    for end in (control, alarm, bell):
        end.setblocking(False)
    signal.set_wakeup_fd(bell.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, bool] = {}  # pid → whether it stays
    rest, idle_s, idle_since = b"", IDLE_S, time.monotonic()
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(alarm, selectors.EVENT_READ)
    while children or time.monotonic() < idle_since + idle_s:
        for key, _ in selector.select(idle_s or None):
            try:
                news = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            except ConnectionError:  # it was killed before it had read all that it was told
                news = b""
            if key.fileobj is alarm:
                for pid, code in ended():
                    children.pop(pid, None)
                    tell(control, pid=pid, code=code)
                    idle_since = time.monotonic()
                continue
            if not news:
                for pid in [pid for pid, stays in children.items() if not stays]:
                    os.kill(pid, signal.SIGTERM)
                return None
            *lines, rest = (rest + news).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                if not asked:
                    idle_s = 0.0
                    continue
                number, order = asked.pop("number"), ForkRequest(**asked)
                try:
                    pid = os.fork()
                except OSError:  # for want of memory or processes
                    tell(control, number=number, pid=None)
                    continue
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for end in (control, alarm, bell):
                        end.close()
                    return order
                children[pid] = order.stays
                tell(control, number=number, pid=pid)
    return None


def tell(control: socket.socket, **what: Any) -> None:
    control.setblocking(True)
    with contextlib.suppress(ConnectionError):  # the driver has gone, which is met next
        control.sendall(json.dumps(what).encode() + b"\n")
    control.setblocking(False)


def ended() -> list[tuple[int, int]]:
    """(pid, exit code) of the children that have ended since they were looked for."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((one[0], os.waitstatus_to_exitcode(one[1])))
    return found


def become(order: ForkRequest) -> None:
    """Be the process that was ordered, in a session of its own, as if it had been started."""
    os.setsid()
    os.chdir(order.folder)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    with contextlib.suppress(OSError):
        # what tools show beside the command, which is the nursery's
        Path("/proc/self/comm").write_text(FORKED)
    os.environ.clear()
    os.environ.update(order.environment)
    if "numpy" in sys.modules:  # `random` does it by itself
        sys.modules["numpy"].random.seed(random.getrandbits(32))
    sys.path[0] = order.folder
    sys.argv = [order.module, *order.arguments]
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
