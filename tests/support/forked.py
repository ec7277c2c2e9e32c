"""What the tests of the fork server have it import and fork: `python -m forked WORD`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import numpy as np

if os.environ.get("CHILD_FAULT") == "threads":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
if os.environ.get("CHILD_FAULT") == "fails":
    raise ImportError("as asked")
if os.environ.get("CHILD_FAULT") == "slow":
    time.sleep(60)


def told() -> dict[str, object]:
    return {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "first": sys.path[0],
        "session": os.getsid(0) == os.getpid(),
        "name": __name__,
        "drawn": np.random.rand(),
        "mask": os.umask(0o077),
        "files": sorted(
            os.readlink(f"/proc/self/fd/{fd}").split(":")[0]
            for fd in os.listdir("/proc/self/fd")[:-1]
        ),
    }


if __name__ == "__main__":
    match sys.argv[1]:
        case "say":
            print(json.dumps(told()))
        case "exit":
            sys.exit(7)
        case "sleep":
            time.sleep(60)
