"""The line of the user's own code that an error went through, or that a thread is in."""

from __future__ import annotations

import linecache
import traceback
from types import FrameType

__all__ = ["users_line", "users_line_in"]

OURS = "/flexkernel/"
LIBRARIES = ("site-packages", "/lib/python")
NO_FILE = ("<string>", "<frozen")


def users_line(error: BaseException) -> str:
    """ " (line 7: x = y)", the last line of the user's code that the error went through. A
    library's where there is none of the user's; "" where there is only ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if OURS not in f.filename]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    if not own:
        return ""
    last = own[-1]
    return f" (line {last.lineno}: {last.line or last.name})"


def users_line_in(frame: FrameType | None) -> str:
    """ "FILE:7 x = y", where a thread is in code that is neither ours nor a library's; "" if it is
    in none."""
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno} {text}".strip()
        frame = frame.f_back
    return ""


def is_users(file: str) -> bool:
    """Whether a file is neither ours nor a library's."""
    return not file.startswith(NO_FILE) and not any(part in file for part in (OURS, *LIBRARIES))
