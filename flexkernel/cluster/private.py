"""Whether a file is this user's alone. Who can read a cluster's files owns its engines."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from flexkernel.errors import ClusterError

__all__ = ["check_encrypted", "check_private", "private_files"]


def check_private(path: Path, key: bool = False) -> None:
    """ClusterError if the file is another user's, or others can read or write it.

    A file that does not exist is private. The folder's mode counts too: `ipcluster start` writes
    files that all could read into a folder that nobody can enter. key: the file holds a key, and
    has to be this user's alone wherever it is."""
    try:
        file = path.stat()
        folder = path.parent.stat()
    except FileNotFoundError:
        return
    for found, which in ((file, path), (folder, path.parent)):
        if found.st_uid != os.getuid():
            raise ClusterError(
                f"{which} belongs to uid {found.st_uid}, and you are uid {os.getuid()}: engines "
                "are attached to through your own files only, whoever wrote these could run code "
                "as you"
            )
    if file.st_mode & 0o077 and (key or folder.st_mode & 0o077):
        raise ClusterError(
            f"{path} has mode {mode(file)} and its folder {mode(folder)}: others on this machine "
            "can read the cluster's key, or change it. If nobody has: "
            f"chmod 600 {path}; chmod 700 {path.parent}"
        )


def mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


def check_encrypted(connection: Path) -> None:
    """ClusterError if other machines can reach a controller that does not encrypt.

    Anyone on the way could read prompts and activations. connection: the file that says where the
    controller is."""
    content = {}
    # Whoever connects finds out what is wrong with the file.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(connection.read_text())
    if not isinstance(content, dict) or content.get("curve_serverkey"):
        return
    scheme, _, host = str(content.get("interface", "")).partition("://")
    if scheme == "tcp" and not is_loopback(host):
        raise ClusterError(
            f"the controller listens on {host}, which other machines reach, without encryption: "
            "start it with CURVE, IPP_ENABLE_CURVE=1 ipcluster start ..., or on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Within it every file that is made, by started processes too, is readable by this user
    only."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)
