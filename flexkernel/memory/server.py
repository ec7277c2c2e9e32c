"""Server: a thread that serves the slabs of a folder to Clients on other hosts."""

from __future__ import annotations

import collections
import contextlib
import hmac
import ipaddress
import json
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zmq

from flexkernel.errors import CaptureError, ClusterError
from flexkernel.wire import Region, dtype_name

from . import reduce
from .channel import (
    DTYPES,
    REQUEST_BYTES,
    Tensors,
    checked_bytes,
    typed,
    unpack_index,
    whole_number,
)
from .slab import on_disk

__all__ = ["Server"]

ANSWER_BYTES = 64 << 20  # the most that one answer may hold
MAX_MAPS = 32
IDLE_MS = 5000


class Server:
    """Serves the slabs in `folder` from a thread of its own, on a free port of `interface`, until
    close().

    token: what every request must carry. keys: CURVE keys (new_keys()), needed on any interface
    but loopback. address and public_key are what a Client needs. The thread reads slabs only: no
    model, no collective.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        token: str,
        interface: str = "127.0.0.1",
        port: int = 0,
        keys: tuple[bytes, bytes] | None = None,
    ):
        if not token:
            raise ClusterError(
                "a data server needs a token: without one, everyone on this host could read "
                "the slabs"
            )
        self._token = token.encode()
        self.public_key = keys[0] if keys else None
        host = _host(interface, bool(keys))
        self._slabs = _Slabs(
            os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        )
        self._context = zmq.Context()
        self._lock, self._closed = threading.Lock(), False
        try:
            self._router, self.address = self._bind(host, port, keys)
        except BaseException:
            self._release()
            raise
        self._stop, stopped = (self._context.socket(zmq.PAIR) for _ in range(2))
        stopped.bind("inproc://stop")
        self._stop.connect("inproc://stop")
        self._thread = threading.Thread(
            target=self._serve, args=(stopped,), name="flexkernel-channel", daemon=True
        )
        self._thread.start()

    def _bind(
        self, host: str, port: int, keys: tuple[bytes, bytes] | None
    ) -> tuple[zmq.Socket, str]:
        router = self._context.socket(zmq.ROUTER)
        router.ipv6 = host.startswith("[")
        router.linger = 0
        router.maxmsgsize = REQUEST_BYTES
        router.rcvhwm = 64
        if keys:
            router.curve_server = True
            router.curve_publickey, router.curve_secretkey = keys
        try:
            router.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            router.close()
            raise ClusterError(
                f"cannot serve slabs on {host}:{port or 'any port'}: {error}"
            ) from None
        return router, str(router.getsockopt_string(zmq.LAST_ENDPOINT))

    def _serve(self, stopped: zmq.Socket) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(IDLE_MS))
            if stopped in ready:
                break
            if not ready:
                self._slabs.forget_gone()
                continue
            with contextlib.suppress(zmq.ZMQError):  # a peer that went away
                self._answer(self._router.recv_multipart())
        stopped.close()

    def _answer(self, frames: list[bytes]) -> None:
        request = _request(frames, self._token)
        if request is None:
            return
        header: dict[str, Any] = {"status": "ok", "id": request.get("id")}
        buffers: list[Any] = []
        try:
            tensors = tuple(t.contiguous() for t in _run(self._slabs, request))
            header["tensors"] = [
                {"shape": [*t.shape], "dtype": dtype_name(t.dtype), "num_bytes": t.nbytes}
                for t in tensors
            ]
            buffers = [_raw(t) for t in tensors]
        except Exception as error:  # whatever a request makes torch say: the thread goes on
            header = {
                "status": "error",
                "id": request.get("id"),
                "type": type(error).__name__,
                "message": str(error),
            }
        self._router.send_multipart([frames[0], json.dumps(header).encode(), *buffers], copy=False)

    def also(self, folder: str | os.PathLike[str]) -> None:
        """Serve slabs that were moved to disk from this folder."""
        before = self._slabs.spilled
        self._slabs.spilled = os.open(
            folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        if before is not None:
            os.close(before)

    def close(self) -> None:
        """Free the port, the thread and the maps. More than once does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stop.send(b"")
            self._thread.join()
            self._release()

    def _release(self) -> None:
        self._context.destroy(linger=0)
        self._slabs.maps.clear()
        os.close(self._slabs.folder)
        if self._slabs.spilled is not None:
            os.close(self._slabs.spilled)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _host(interface: str, encrypted: bool) -> str:
    """The interface as zmq wants it; ClusterError if it would be open to a network without
    encryption."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if interface == "localhost" else interface)
    except ValueError:
        raise ClusterError(
            f"an interface is named by its address, e.g. 127.0.0.1; found {interface!r}"
        ) from None
    if address.is_unspecified:
        raise ClusterError(f"{interface} is every interface of this host: name one by its address")
    if not address.is_loopback and not encrypted:
        raise ClusterError(
            f"{interface} can be reached from other hosts: that needs CURVE keys "
            "(channel.new_keys())"
        )
    return f"[{address}]" if address.version == 6 else str(address)


def _request(frames: list[bytes], token: bytes) -> dict | None:
    """The request, if the frames are one and carry the token; None is not answered."""
    try:
        _, header = frames
        request = json.loads(header)
        given = request["token"].encode()
    except Exception:  # anyone on this host can send anything
        return None
    return request if hmac.compare_digest(given, token) else None


def _run(slabs: _Slabs, request: dict) -> Tensors:
    if not isinstance(request.get("op"), str) or request["op"] not in OPS:
        raise ValueError(
            f"{str(request.get('op'))[:40]!r} cannot be asked; there are {', '.join(OPS)}"
        )
    shape, args = request.get("shape"), request.get("args", {})
    if not isinstance(shape, list) or not isinstance(args, dict):
        raise ValueError("a request has a list `shape` and an object `args`")
    region = Region(request.get("slab"), request.get("offset"), tuple(shape), request.get("dtype"))  # type: ignore[arg-type]
    checked_bytes(region)
    with torch.no_grad():
        return OPS[request["op"]](slabs, region, **args)


# --- what can be asked ----------------------------------------------------------------


def _read(slabs: _Slabs, region: Region, start: Any, num_bytes: Any) -> Tensors:
    """Bytes of the region from `start`, relative to it: (num_bytes,) uint8.
    ValueError: they reach beyond the region or are too many. CaptureError: the slab is gone."""
    whole_number(start, "start"), whole_number(num_bytes, "num_bytes")
    total = checked_bytes(region)
    slabs.check(region.slab, region.offset, total)
    if start + num_bytes > total or num_bytes > ANSWER_BYTES:
        raise ValueError(
            f"the region has {total:,} bytes, an answer at most {ANSWER_BYTES:,}; "
            f"asked for {num_bytes:,}"
        )
    return (slabs.raw(region.slab, region.offset + start, num_bytes),)


def _slice(slabs: _Slabs, region: Region, index: Any, narrow: Any = None) -> Tensors:
    part = slabs.tensor(region)[unpack_index(index)]
    if narrow is not None:
        part = part.narrow(*(whole_number(n, "narrow") for n in narrow))
    if part.nbytes > ANSWER_BYTES:
        raise ValueError(
            f"the slice has {part.nbytes:,} bytes, an answer at most {ANSWER_BYTES:,}: "
            "ask for less of it"
        )
    return (part,)


def _reduce(
    slabs: _Slabs, region: Region, name: str, dims: Any, keepdim: bool = False, **more: Any
) -> Tensors:
    value = reduce.partial(name, slabs.tensor(region), dims, keepdim, **more).value()
    return value if isinstance(value, tuple) else (value,)


def _matrix(slabs: _Slabs, region: Region, index: Any) -> torch.Tensor:
    """What is drawn, the region or region[index], as rows of its last dim: (rows, last dim), or
    (1, 1) for a 0-d value, in the region's dtype. IndexError: the index is outside the shape."""
    whole = slabs.tensor(region)
    part = whole if index is None else whole[unpack_index(index)]
    return part.reshape(-1, part.shape[-1] if part.dim() else 1)


def _sized(size: Any) -> int:
    if whole_number(size, "the size of a picture", 1) > 1 << 14:
        raise ValueError(f"a picture has at most {1 << 14} pixels a side, not {size}")
    return size


def _tiles(
    slabs: _Slabs, region: Region, index: Any, rows, cols, height, width, how: str
) -> Tensors:
    return (
        reduce.tiles(_matrix(slabs, region, index), rows, cols, _sized(height), _sized(width), how),
    )


def _bounds(slabs: _Slabs, region: Region, index: Any, rows, cols, height, width) -> Tensors:
    return reduce.bounds(_matrix(slabs, region, index), rows, cols, _sized(height), _sized(width))


def _histogram(slabs: _Slabs, region: Region, lo: float, hi: float, bins: int) -> Tensors:
    found = reduce.histogram(slabs.tensor(region), lo, hi, _sized(bins))
    return found.counts, torch.tensor([found.below, found.above, found.nan])


def _count_nan(slabs: _Slabs, region: Region, index: Any, rows, cols) -> Tensors:
    return (torch.tensor(reduce.count_nan(_matrix(slabs, region, index), rows, cols)),)


OPS: dict[str, Callable[..., Tensors]] = {
    "read": _read,
    "slice": _slice,
    "reduce": _reduce,
    "tiles": _tiles,
    "bounds": _bounds,
    "histogram": _histogram,
    "count_nan": _count_nan,
}


# --- the folder that is served --------------------------------------------------------


@dataclass
class _Slabs:
    """Read access to the slab files of one folder: regular files of this user, by name, never
    through a link."""

    folder: int  # descriptor
    spilled: int | None = None  # of the folder on disk
    maps: collections.OrderedDict[str, tuple[tuple, torch.Tensor]] = field(
        default_factory=collections.OrderedDict
    )

    def raw(self, name: str, offset: int, num_bytes: int) -> torch.Tensor:
        """Those bytes: (num_bytes,) uint8 on the CPU. A view of the mapped file where every page
        has memory behind it, else a copy: reading a mapped page without memory can be a SIGBUS.

        CaptureError: the slab is gone or shorter, or has pages without memory and more than
        ANSWER_BYTES were asked for."""
        found = self.check(name, offset, num_bytes)
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if found.st_blocks * 512 < found.st_size:
            return torch.frombuffer(
                bytearray(self._pread(name, offset, num_bytes)), dtype=torch.uint8
            )
        return self._map(name, found)[offset : offset + num_bytes]

    def check(self, name: str, offset: int, num_bytes: int) -> os.stat_result:
        """The file's state; CaptureError if it does not reach that far."""
        found = self._stat(name)
        if offset + num_bytes > found.st_size:
            raise CaptureError(
                f"slab {name!r} has {found.st_size:,} bytes; "
                f"asked for {num_bytes:,} from byte {offset:,}"
            )
        return found

    def _stat(self, name: str) -> os.stat_result:
        try:
            found = os.stat(name, dir_fd=self._home(name), follow_symlinks=False)
        except FileNotFoundError:
            self.maps.pop(name, None)
            raise CaptureError(
                f"slab {name!r} is not there any more: its run was freed or has expired"
            ) from None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise CaptureError(f"{name!r} is not a slab of this user")
        return found

    def _home(self, name: str) -> int:
        return self.folder if self.spilled is None or not on_disk(name) else self.spilled

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[int]:
        fd = os.open(
            name,
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            dir_fd=self._home(name),
        )
        try:
            yield fd
        finally:
            os.close(fd)

    def _pread(self, name: str, offset: int, num_bytes: int) -> bytes:
        if num_bytes > ANSWER_BYTES:
            raise CaptureError(
                f"slab {name!r} has pages without memory: "
                f"read it in parts of {ANSWER_BYTES:,} bytes"
            )
        with self._open(name) as fd:
            data = os.pread(fd, num_bytes, offset)
        if len(data) != num_bytes:
            raise CaptureError(f"slab {name!r} shrank while it was read")
        return data

    def _map(self, name: str, found: os.stat_result) -> torch.Tensor:
        """The whole file, mapped: (num_bytes,) uint8 on the CPU. CaptureError: another file has
        taken its name since `found`.

        The map is private and never written: a read-only one would make torch warn at every
        read."""
        state = (found.st_dev, found.st_ino, found.st_size)
        if self.maps.get(name, (None,))[0] != state:
            with self._open(name) as fd:
                opened = os.fstat(fd)
                if (opened.st_dev, opened.st_ino, opened.st_size) != state:
                    raise CaptureError(f"slab {name!r} was replaced while it was opened: ask again")
                own = mmap.mmap(
                    fd, found.st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            self.maps[name] = state, torch.from_numpy(np.frombuffer(own, dtype=np.uint8))
        self.maps.move_to_end(name)
        while len(self.maps) > MAX_MAPS:
            self.maps.popitem(last=False)
        return self.maps[name][1]

    def forget_gone(self) -> None:
        """Drop the maps of removed files: a map keeps their memory taken."""
        for name in list(self.maps):
            with contextlib.suppress(CaptureError):
                self._stat(name)

    def tensor(self, region: Region) -> torch.Tensor:
        """The region, of its shape and dtype, on the CPU: a view of the mapped file, or a copy
        where its bytes are not aligned for the dtype or have no memory behind them. Never write
        to it.

        ValueError: it is no region. CaptureError: the slab is gone or shorter."""
        raw = self.raw(region.slab, region.offset, checked_bytes(region))
        if raw.storage_offset() % DTYPES[region.dtype].itemsize:
            raw = raw.clone()
        return typed(raw, region)


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes, in order: (num_bytes,) uint8 array. tensor: any shape and dtype, on the
    CPU; copied only where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
