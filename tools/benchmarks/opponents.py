"""Opponents: packages that are installed for a benchmark only, without their dependencies, into a
folder of their own.

The folder comes last on the path, so that whatever the project itself uses stays as it is.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

__all__ = ["PACKAGES", "folder", "tried", "versions"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("flex-model==0.1.0", "nnsight==0.8.1", "zstandard==0.25.0")  # the last is nnsight's
_tried: list[str] = []


def folder() -> Path:
    """Where they are; the first to ask installs them. RuntimeError: they cannot be had here."""
    where = ROOT / "build" / "opponents"
    if not (where / "complete").exists():
        asked = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*asked, "--target", str(where), *PACKAGES], capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            _tried.append(f"pip install --no-deps {' '.join(PACKAGES)}: {last}")
            raise RuntimeError(_tried[-1])
        (where / "complete").touch()
    if str(where) not in sys.path:
        sys.path.append(str(where))
    return where


def tried() -> list[str]:
    """What could not be installed, and why."""
    return list(_tried)


def versions() -> dict[str, str]:
    """Package → version, of those that are there."""
    found = {}
    for dist in importlib.metadata.distributions(path=[str(ROOT / "build" / "opponents")]):
        found[dist.metadata["Name"]] = dist.version
    return dict(sorted(found.items()))
