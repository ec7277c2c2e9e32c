"""The fork server: a process that has imported what engines import, and forks them.

To import torch and transformers takes each engine seconds of a core, and on many machines their
files come over a network. Forked engines share what one process has read, and one that replaces a
dead engine is there in a moment. Android's zygote and multiprocessing's forkserver work so too.
Here a forked process belongs to no `multiprocessing`, and may outlive the driver.

A driver has one fork server beside its engines. It ends with the driver, or after ten minutes
without engines.

Between the two go JSON lines. To the server: a ForkRequest with a number, or {} to retire. Back:
whether it is ready, the pid of each number, and the exit code of each pid.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environment import inherited

__all__ = ["FORKED", "ForkRequest", "ForkServer", "fork_server"]

READY_S = 120.0  # how long the imports may take; after that each engine makes its own
FORK_S = 30.0
GIVE_UP_POLL_S = 30.0  # how often whoever waits for an end is asked whether it still does
IDLE_S = 600.0
FORKED = "flex-engine"  # the name of a forked process
# Engines of one fork server may differ in these: nothing reads them during the imports.
MAY_DIFFER = ("FLEX_", "IPP_", "TORCHINDUCTOR_")


@dataclass(frozen=True)
class ForkRequest:
    """What a forked process is to run: a module, as `python -m` would.

    folder: where it works. log: the file for its output. stays: it outlives the driver."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    log: str
    stays: bool


# --- in the driver --------------------------------------------------------------------


class ForkServer:
    """The driver's end of a fork server.

    modules: what it imports. environment: what forked processes inherit of the driver's, and the
    server has while it imports. can_fork: False once one was never ready; another would not be
    either."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]):
        self.environment = inherited(environment)
        self.driver = os.getpid()
        self.can_fork = True
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-m", "flexkernel.cluster.environment", "-m", __name__]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), *modules],
            env=self.environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the driver's terminal does not reach it
        )
        theirs.close()
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._ready: bool | None = None  # None: it imports
        self._was_ready = False
        self._numbers = itertools.count()
        self._requested: set[int] = set()  # the numbers of requests whose pid is waited for
        self._forked: dict[int, int | None] = {}  # number → pid
        self._ended: dict[int, int] = {}  # pid → exit code
        threading.Thread(target=self._listen, name="flexkernel-forkserver", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        return self._process.poll() is None and self._ready is not False

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a forked process is as if it had been started with this environment."""
        return fixed_part(self.environment) == fixed_part(environment)

    def fork(self, request: ForkRequest) -> int | None:
        """The pid of a process that runs this request. None: it cannot be forked, start it."""
        number = self._next_number()
        if number is None:
            return None
        try:
            self._send({"number": number, **asdict(request)})
            with self._changed:
                self._changed.wait_for(lambda: number in self._forked or not self._ready, FORK_S)
                return self._forked.pop(number, None)
        finally:
            with self._changed:
                self._requested.discard(number)
                kill(self._forked.pop(number, None))  # of a fork that was interrupted

    def _next_number(self) -> int | None:
        """A number for a request, once the server is ready. None: it never will be."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready is not None, READY_S):
                self._process.kill()
                self._ready = False
            if not self._ready:
                self.can_fork = self._was_ready
                return None
            self._was_ready = True
            number = next(self._numbers)
            self._requested.add(number)
            return number

    def wait(self, pid: int, given_up: Callable[[], bool]) -> int | None:
        """The exit code of a forked process once it has ended, minus a signal's number.

        None: the server has gone before, or given_up() says that nobody waits any more."""
        with self._changed:
            while pid not in self._ended and self._ready and not given_up():
                self._changed.wait(GIVE_UP_POLL_S)
            return self._ended.pop(pid, None)

    def retire(self) -> None:
        """Have it end when all that it has forked has ended."""
        self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        try:
            with contextlib.suppress(OSError), self._control.makefile("r") as lines:
                for line in lines:
                    with self._changed:
                        self._note(json.loads(line))
                        self._changed.notify_all()
        finally:
            with self._changed:
                self._ready = False
                self._changed.notify_all()
        self._process.wait()

    def _note(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready = message["ready"]
        elif "number" not in message:
            self._ended[message["pid"]] = message["code"]
        elif message["number"] in self._requested:
            self._forked[message["number"]] = message["pid"]
        else:  # whoever requested it has given up
            kill(message["pid"])


def kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fixed_part(environment: Mapping[str, str]) -> dict[str, str]:
    """What must be equal in the environments of all engines of one fork server."""
    return {
        name: value
        for name, value in inherited(environment).items()
        if not name.startswith(MAY_DIFFER)
    }


_current: ForkServer | None = None  # this process's


def fork_server(modules: Sequence[str], environment: Mapping[str, str]) -> ForkServer | None:
    """This driver's fork server for that environment, started if there is none. None: processes
    cannot be forked here."""
    global _current
    if sys.platform != "linux":  # elsewhere the system's own libraries forbid it
        return None
    if _current is not None and _current.driver != os.getpid():
        _current = None  # it belongs to the process that this one was forked from
    if _current is not None and _current.suits(environment):
        if not _current.can_fork:
            return None
        if _current.is_usable:
            return _current
    elif _current is not None:
        _current.retire()
    _current = ForkServer(modules, environment)
    return _current


# --- in the fork server ---------------------------------------------------------------


def main() -> None:
    leave = QuickExit()
    os.umask(0o077)
    control = socket.socket(fileno=int(sys.argv[1]))
    with ending_with_driver(control):
        for name in sys.argv[2:]:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to what all share, and so copy it
    why = why_not_fork()
    control.sendall(json.dumps({"ready": not why, "why": why}).encode() + b"\n")
    if why:
        return
    request = Forker(control).serve()
    if request is not None:
        become(request, leave)


class QuickExit:
    """Ends a forked process after its exit handlers, without taking the interpreter apart.

    With torch and transformers in memory that takes seconds: whoever ends the process would kill it
    meanwhile. It has to be made before anything registers an exit handler, since the last one runs
    first. code: the exit code; None: end as usual."""

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(self.code)

    @contextlib.contextmanager
    def noting_code(self) -> Iterator[None]:
        """Within it runs the program whose exit code counts."""
        try:
            yield
            self.code = 0
        except SystemExit as error:
            self.code = exit_status(error)
            raise
        except Exception:
            self.code = 1
            raise


def exit_status(error: SystemExit) -> int:
    """The exit code that Python gives a process that ends with this."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    return 1


@contextlib.contextmanager
def ending_with_driver(control: socket.socket) -> Iterator[None]:
    """Within it this process ends when its driver does.

    The driver sends nothing before it hears that the server is ready. So whatever comes means that
    it has gone."""
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    # Whatever comes is a SIGIO, which by default ends the process.
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        if selector.select(0):  # it came before
            sys.exit()
    yield
    fcntl.fcntl(control, fcntl.F_SETFL, flags)


def why_not_fork() -> str:
    """Why a process that this one forks could not be relied on; "" if it could.

    Other threads are not forked, and hold their locks for ever. A GPU's driver does not work in a
    process that was forked after its first use."""
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        return f"{num_threads} threads"
    for file in open_files():
        if file.startswith("/dev/nvidia"):
            return f"{file} is open"
    return ""


def open_files() -> list[str]:
    """The files that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this loop has gone already
            found.append(os.readlink(path))
    return found


class Forker:
    """The server's end: forks at each request, and reports how what was forked ends."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._alarm, self._bell = socket.socketpair()  # a SIGCHLD rings the bell
        self._children: dict[int, bool] = {}  # pid → whether it stays
        self._rest = b""  # of a line that has not come whole
        self._idle_s = IDLE_S
        self._idle_since = time.monotonic()
        self._selector = selectors.DefaultSelector()

    def serve(self) -> ForkRequest | None:
        """In the server: None once all is over. In a process that it has forked: what to run."""
        self._listen()
        while self._children or time.monotonic() < self._idle_since + self._idle_s:
            for key, _ in self._selector.select(self._idle_s or None):
                news = receive(key.fileobj)  # type: ignore[arg-type]
                if key.fileobj is self._alarm:
                    self._on_child()
                elif not news:
                    self._on_driver_gone()
                    return None
                else:
                    request = self._on_news(news)
                    if request is not None:
                        return request
        return None

    def _listen(self) -> None:
        for end in (self._control, self._alarm, self._bell):
            end.setblocking(False)
        signal.set_wakeup_fd(self._bell.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._alarm, selectors.EVENT_READ)

    def _on_child(self) -> None:
        """Report the children that have ended."""
        for pid, code in ended_children():
            self._children.pop(pid, None)
            self._tell(pid=pid, code=code)
            self._idle_since = time.monotonic()

    def _on_driver_gone(self) -> None:
        """End the children that do not outlive their driver."""
        for pid, stays in self._children.items():
            if not stays:
                os.kill(pid, signal.SIGTERM)

    def _on_news(self, news: bytes) -> ForkRequest | None:
        """Take lines from the driver. In a forked process: what to run."""
        *lines, self._rest = (self._rest + news).split(b"\n")
        for line in lines:
            request = self._on_request(json.loads(line))
            if request is not None:
                return request
        return None

    def _on_request(self, message: dict[str, Any]) -> ForkRequest | None:
        """Fork. In the forked process: what to run."""
        if not message:  # retire
            self._idle_s = 0.0
            return None
        number = message.pop("number")
        request = ForkRequest(**message)
        try:
            pid = os.fork()
        except OSError:  # for lack of memory or processes
            self._tell(number=number, pid=None)
            return None
        if pid == 0:
            self._let_go()
            return request
        self._children[pid] = request.stays
        self._tell(number=number, pid=pid)
        return None

    def _let_go(self) -> None:
        """In a forked process: keep nothing of the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (self._control, self._alarm, self._bell):
            end.close()

    def _tell(self, **message: Any) -> None:
        self._control.setblocking(True)
        with contextlib.suppress(ConnectionError):  # the driver has gone, as the next read shows
            self._control.sendall(json.dumps(message).encode() + b"\n")
        self._control.setblocking(False)


def receive(end: socket.socket) -> bytes:
    """What has come; b"" if the other end has gone."""
    try:
        return end.recv(1 << 16)
    except ConnectionError:  # it was killed before it had read all
        return b""


def ended_children() -> list[tuple[int, int]]:
    """(pid, exit code) of the children that have ended since the last call."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def become(request: ForkRequest, leave: QuickExit) -> None:
    """Be the requested process, in a session of its own, as if it had been started."""
    os.setsid()
    os.chdir(request.folder)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    with contextlib.suppress(OSError):
        # Tools show this name beside the command, which is the fork server's.
        Path("/proc/self/comm").write_text(FORKED)
    os.environ.clear()
    os.environ.update(request.environment)
    if "numpy" in sys.modules:  # `random` seeds itself anew
        sys.modules["numpy"].random.seed(random.getrandbits(32))
    sys.path[0] = request.folder
    sys.argv = [request.module, *request.arguments]
    with leave.noting_code():
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
