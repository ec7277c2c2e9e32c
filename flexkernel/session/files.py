"""Files that a user keeps: each appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from flexkernel.errors import FlexError

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], kind: type[FlexError]) -> Iterator[str]:
    """The name of a file to write, 0600, which takes the path's place once the block has ended and
    its bytes are on the disk. An error of that kind: it could not be written, the disk is full for
    instance; what was there is as it was."""
    path = Path(path)
    part = ""
    try:
        handle, part = tempfile.mkstemp(
            dir=path.parent or ".", prefix=f".{path.name}-", suffix=".part"
        )
        os.close(handle)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise kind(f"{path} cannot be written, and is as it was: {error}") from error
    finally:
        if part:
            Path(part).unlink(missing_ok=True)
