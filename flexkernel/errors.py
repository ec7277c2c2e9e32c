"""Every error flexkernel raises on purpose.

FlexError
├── ClusterError          engines cannot be started, reached or attached
│   └── EngineDied        an engine's process ended while it held a piece of the model
├── LoadError             a model cannot be loaded as asked
│   └── LayoutError       degrees, heads, world size or shards that do not fit together
├── HookError             a hook, a group or a module name that means nothing
├── PromptError           a prompt or token ids the model cannot take
├── GenerationError       an option of generation that is not there, or cannot be had here
├── PlacementError        where a shard lies in the whole tensor is not known
├── CaptureError          an activation that is not there
│   └── CaptureExpired    it was there, and the store of runs has given its memory back
├── ViewError             a view that is not there
├── MemoryBudgetError     the bytes would not fit; refused before the forward
└── EngineError           code on an engine raised; carries the rank and the engine's traceback
    ├── EditError         a user's edit raised, or returned what cannot take the activation's place
    └── LossError         a user's loss raised, or is not one number that can be differentiated
"""

from __future__ import annotations

import os
import re

__all__ = [
    "CaptureError",
    "CaptureExpired",
    "ClusterError",
    "EditError",
    "EngineDied",
    "EngineError",
    "FlexError",
    "GenerationError",
    "HookError",
    "LayoutError",
    "LoadError",
    "LossError",
    "MemoryBudgetError",
    "PlacementError",
    "PromptError",
    "ViewError",
    "first_line",
    "named",
]


MOST = 8000  # characters of a message
FRAME = re.compile(r'^  File ".*\n(?:    .*\n)*', re.MULTILINE)
LIBRARIES = ("/site-packages/", "/lib/python", f"{os.path.dirname(__file__)}{os.sep}")


class FlexError(Exception):
    """Base of the tree. In a notebook it shows as one block: what was asked, what was found, what
    to do."""

    def __init__(self, message: str = ""):
        super().__init__(shortened(str(message)))

    def _render_traceback_(self) -> list[str]:
        """Jupyter asks an exception for its own traceback; ours is the sentence, not our
        insides."""
        return [f"{type(self).__name__}: {self}"]


class ClusterError(FlexError):
    pass


class EngineDied(ClusterError):
    """rank: whose engine it was."""

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class LoadError(FlexError):
    pass


class LayoutError(LoadError):
    pass


class HookError(FlexError):
    pass


class PromptError(FlexError):
    pass


class GenerationError(FlexError):
    pass


class PlacementError(FlexError):
    pass


class CaptureError(FlexError):
    pass


class CaptureExpired(CaptureError):
    pass


class ViewError(FlexError, ValueError):
    pass


class MemoryBudgetError(FlexError):
    pass


class EngineError(FlexError):
    """An engine raised.

    rank: which one, the earliest where several did. remote_traceback: its text, as the engine saw
    it.
    """

    def __init__(self, message: str, rank: int | None = None, remote_traceback: str = ""):
        super().__init__(message)
        self.rank = rank
        self.remote_traceback = remote_traceback

    def _render_traceback_(self) -> list[str]:
        block = super()._render_traceback_()
        if shown := self._shown_traceback():
            block += [f"--- traceback of rank {self.rank} ---", shown]
        return block

    def _shown_traceback(self) -> str:
        return self.remote_traceback.rstrip()


def users_frames(error: EngineError) -> str:
    """The frames of the user's own files, where a function of the user called others of theirs.

    The message names the line; the frames of ours and of torch say nothing about it."""
    frames = [frame for frame in FRAME.findall(error.remote_traceback) if is_users(frame)]
    return "".join(frames).rstrip() if len(frames) > 1 else ""


class EditError(EngineError):
    _shown_traceback = users_frames


class LossError(EngineError):
    _shown_traceback = users_frames


def is_users(frame: str) -> bool:
    """Whether a frame of a traceback is of a user's file or cell."""
    path = frame.partition('"')[2].partition('"')[0]
    return not any(part in path for part in LIBRARIES)


def shortened(text: str, most: int = MOST) -> str:
    """A text without its middle where it is very long: who asks with a megabyte is not answered
    with one."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none.

    >>> first_line(ValueError("no such file\\nin folder x")), first_line(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named(name: str) -> type[FlexError]:
    """The error class of that name, EngineError for any that is not ours: how an engine's error
    gets its type back."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, FlexError) else EngineError
