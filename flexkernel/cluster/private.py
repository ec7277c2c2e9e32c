"""Privacy: whether a file is this user's alone. Who can read a cluster's files owns its
engines."""

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
    """ClusterError if the file is another user's, or others can read or write it; one that is not
    there is private.

    Its folder's mode counts too, since `ipcluster start` writes files that all could read into a
    folder that nobody can enter. key: it holds a key, and is written for this user alone wherever
    it is."""
    try:
        file, folder = path.stat(), path.parent.stat()
    except FileNotFoundError:
        return
    for found, which in ((file, path), (folder, path.parent)):
        if found.st_uid != os.getuid():
            raise ClusterError(
                f"{which} belongs to uid {found.st_uid}, and you are uid {os.getuid()}: engines are attached to "
                "through your own files only, whoever wrote these could run code as you"
            )
    if file.st_mode & 0o077 and (key or folder.st_mode & 0o077):
        raise ClusterError(
            f"{path} has mode {stat.S_IMODE(file.st_mode):04o} and its folder {stat.S_IMODE(folder.st_mode):04o}: "
            "others on this machine can read the cluster's key, or change it. If nobody has: "
            f"chmod 600 {path}; chmod 700 {path.parent}"
        )


def check_encrypted(connection: Path) -> None:
    """ClusterError if a controller, by the file that says where it is, can be reached from other
    machines and does not encrypt: prompts and activations would be for anyone on the way to
    read."""
    said = {}
    # whoever connects says what is wrong with it
    with contextlib.suppress(OSError, ValueError, RecursionError):
        said = json.loads(connection.read_text())
    if not isinstance(said, dict) or said.get("curve_serverkey"):
        return
    scheme, _, host = str(said.get("interface", "")).partition("://")
    if scheme == "tcp" and not loopback(host):
        raise ClusterError(
            f"the controller listens on {host}, which other machines reach, without encryption: start it with CURVE, "
            "IPP_ENABLE_CURVE=1 ipcluster start ..., or on 127.0.0.1"
        )


def loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What is made meanwhile, by started processes too, is readable by this user only."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)
