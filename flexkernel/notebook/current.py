"""The notebook's session: which one the magics work on, how it begins and how it ends."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexkernel.errors import ClusterError

from .display import Bars

if TYPE_CHECKING:
    from flexkernel.session.session import Session
    from flexkernel.session.status import Status

VARIABLE = "flex"  # under this name the notebook has the session
NO_ENGINES = (
    "there are no engines yet: %flex_cluster start -n 2 starts two, %flex_cluster attach takes "
    "those of a running cluster, %flex_cluster local uses this process"
)


class NotStarted:
    """What `flex` is in the FlexKernel kernel while there are no engines."""

    def __repr__(self) -> str:
        return NO_ENGINES

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # IPython looks for ways to show it
            raise AttributeError(name)
        raise ClusterError(NO_ENGINES)


class CurrentSession:
    """The session that the magics of one shell work on.

    The notebook has it as `flex` too, unless the user has a variable of that name.
    """

    def __init__(self, shell: Any, session: Session | None = None):
        self.shell = shell
        self.session = session
        self.bar = Bars(shell, self.explain)
        self._launcher: str | None = None  # what started its engines
        self._explained = 0  # number of the last run whose interrupt was explained
        self._promised = False
        self._ended: weakref.WeakSet[Session] = weakref.WeakSet()

    def get(self) -> Session:
        """The current session. ClusterError: there is none."""
        session = self.find()
        if session is None:
            raise ClusterError(NO_ENGINES)
        if session is not self.session:
            self.use(session)
        return session

    def find(self) -> Session | None:
        """The session of an earlier magic, else the newest that the user made in Python."""
        if self.session is not None:
            return self.session
        module = sys.modules.get("flexkernel.session.session")
        if module is None:  # never imported: nobody can have made one
            return None
        for value in reversed(list(self.shell.user_ns.values())):
            if isinstance(value, module.Session) and self._is_open(value):
                return value
        return None

    def _is_open(self, session: Session) -> bool:
        return session not in self._ended and not session.engines.closed

    def use(self, session: Session) -> Session:
        """Make this the current session, and end the one before it."""
        before = self.session
        self.session = session
        session.bar = self.bar
        variables = self.shell.user_ns
        ours = variables.get(VARIABLE) is before or isinstance(variables.get(VARIABLE), NotStarted)
        if VARIABLE not in variables or ours:
            self.shell.push({VARIABLE: session}, interactive=False)
        if before is not None and before is not session:
            self._end(before)
        return session

    def _end(self, session: Session, end: bool | None = None) -> None:
        self._ended.add(session)
        self.shell.drop_by_id({VARIABLE: session})
        if self._promised:
            self.promise()
        session.close(end)

    def promise(self) -> None:
        """Have `flex` say how to start engines while there are none, if the name is free."""
        self._promised = True
        if VARIABLE not in self.shell.user_ns:
            self.shell.push({VARIABLE: NotStarted()}, interactive=False)

    def explain(self, interrupt: BaseException) -> None:
        """Have a KeyboardInterrupt shown in one line, which says what it left."""
        text = self._interrupted()
        # IPython asks an exception for its own traceback.
        interrupt._render_traceback_ = lambda: [f"KeyboardInterrupt: {text}"]  # type: ignore[attr-defined]

    def _interrupted(self) -> str:
        runs = self.session.runs if self.session is not None else []
        if not runs or not runs[-1].partial or runs[-1].number == self._explained:
            return "interrupted"
        last = runs[-1]
        self._explained = last.number
        tokens = max(map(len, last.new_ids), default=0)
        after = f" after {tokens} token{'s' * (tokens != 1)}" if last.new_ids else ""
        return f"interrupted{after}; what was captured is {VARIABLE}.last"

    # --- what %flex_cluster does

    def start(self, n: int = 2, engines: str | None = None, keep: bool = False) -> Session:
        with self.bar("", stage=f"starting {n} engine{'s' * (n != 1)}") as bar:
            from flexkernel.session.start import start

            session = self.use(start(n, engines, keep=keep, progress=stages(bar)))
        self._launcher = engines
        return session

    def attach(
        self,
        profile: str | None = None,
        cluster_id: str | None = None,
        take: bool = False,
        read_only: bool = False,
    ) -> Session:
        with self.bar("", stage="attaching to running engines") as bar:
            from flexkernel.session.session import attach

            session = attach(profile, cluster_id, take, read_only, stages(bar))
        before = self.session
        if before is not None and before.engines.owned and same_engines(before, session):
            # These engines end with the session that started them, so that one stays.
            session.close()
            return before
        return self.use(session)

    def local(self) -> Session:
        with self.bar("this process", stage="preparing"):
            from flexkernel.session.session import local

            return self.use(local())

    def status(self) -> Status:
        return self.get().status()

    def restart(self, rank: int | None = None) -> Session:
        """Replace one rank's engine, or end all engines and start as many."""
        session = self.get()
        cluster = session.engines
        if rank is not None:
            with self.bar(f"rank {rank}", stage="restarting"):
                session.restart(rank)
            return session
        if not cluster.owned:
            raise ClusterError(
                "these engines were attached, not started here: "
                "restart them where they were started"
            )
        if not hasattr(cluster, "cluster_id"):  # the engine is this process
            return self.local()
        self.stop()  # before the new ones: they need the memory
        return self.start(cluster.size, self._launcher)

    def stop(self) -> None:
        session = self.get()
        self.session = None
        self._end(session, end=session.engines.owned or getattr(session.engines, "kept", False))


def stages(bar: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """Shows what start and attach report. Their stages say how many engines are there, so the bar
    does not."""
    return lambda stage, _done, _total: bar(stage, 0, 0)


def same_engines(a: Session, b: Session) -> bool:
    return getattr(a.engines, "pids", None) == getattr(b.engines, "pids", ())
