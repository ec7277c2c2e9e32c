"""The other-host data plane: a thread that serves the slabs of a folder, and its client. Only this
file uses zmq.

A request is one JSON frame; an answer is a JSON frame and one raw buffer for each tensor. Nothing
is ever unpickled. What a request says is checked against the file before a byte is touched; one
without the token gets no answer.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import ipaddress
import json
import math
import mmap
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from flexkernel.errors import CaptureError, ClusterError, FlexError, named
from flexkernel.wire import Region, dtype_name

from . import reduce
from .reduce import Histogram
from .slab import on_disk

__all__ = ["Client", "Server", "new_keys"]

# what lies in a processor's cache until it is put in its place; half and twice of it is slower
CHUNK_BYTES = 4 << 20
PIPELINE = 4  # chunks asked for and not yet here
REQUEST_BYTES = 64 << 10  # a longer frame is not one of ours: zmq hangs up on it
ANSWER_BYTES = 64 << 20  # the most that one answer may hold
MAX_DIMS = 64
MAX_MAPS = 32
MAX_IDLE = 4  # connections that a client keeps
IDLE_MS = 5000
RETRY_S = 0.05
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
RARE = (
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.bool,
)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
DTYPES = {dtype_name(dtype): dtype for dtype in (*FLOATS, *RARE, *SIGNED, *UNSIGNED)}
Tensors = tuple[torch.Tensor, ...]


def new_keys() -> tuple[bytes, bytes]:
    """(public, secret) CURVE keys for a Server that is to be reached from other hosts."""
    return zmq.curve_keypair()


# --- what both sides say --------------------------------------------------------------


def _whole_number(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{name} must be a whole number from {least} on, not {str(value)[:40]!r}")
    return value


def _checked(region: Region) -> int:
    """Bytes of a region that someone else described; ValueError where it describes none."""
    if not isinstance(region.slab, str) or not NAME.fullmatch(region.slab):
        raise ValueError(f"{str(region.slab)[:40]!r} is no name of a slab")
    if not isinstance(region.dtype, str) or region.dtype not in DTYPES:
        raise ValueError(f"{str(region.dtype)[:40]!r} is no dtype; there are {', '.join(DTYPES)}")
    if len(region.shape) > MAX_DIMS:
        raise ValueError(f"a shape has at most {MAX_DIMS} dims, not {len(region.shape)}")
    for dim in region.shape:
        _whole_number(dim, "each dim of a shape")
    _whole_number(region.offset, "the offset")
    return math.prod(region.shape) * DTYPES[region.dtype].itemsize


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's bytes, not copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _typed(raw: torch.Tensor, region: Region) -> torch.Tensor:
    """Those bytes as the region's tensor. An empty array has strides that torch will not view as
    another dtype."""
    dtype = DTYPES[region.dtype]
    return (
        raw.view(dtype).view(region.shape) if len(raw) else torch.empty(region.shape, dtype=dtype)
    )


def _pack_index(index: Any) -> list:
    """An index as JSON: whole numbers, [start, stop, step], null for a new dim, "..."."""
    packed: list = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            packed.append(
                [None if p is None else int(p) for p in (part.start, part.stop, part.step)]
            )
        elif part is None or (
            hasattr(part, "__index__")
            and not isinstance(part, bool)
            and not getattr(part, "ndim", 0)
        ):
            packed.append(part if part is None else int(part))
        elif part is Ellipsis:
            packed.append("...")
        else:
            raise TypeError(
                f"from another host, index with whole numbers and slices, or .tensor() first; not {part!r}"
            )
    return packed


def _unpack_index(packed: Any) -> tuple:
    if not isinstance(packed, list) or len(packed) > 2 * MAX_DIMS:
        raise ValueError("an index is a list of whole numbers, [start, stop, step], null and '...'")
    parts: list = []
    for part in packed:
        if (
            isinstance(part, list)
            and len(part) == 3
            and all(p is None or type(p) is int for p in part)
        ):
            parts.append(slice(*part))
        elif part is None or type(part) is int:
            parts.append(part)
        elif part == "...":
            parts.append(Ellipsis)
        else:
            raise ValueError(f"{str(part)[:40]!r} cannot be part of an index")
    return tuple(parts)


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
        """Those bytes as uint8; mapped only where every page has memory behind it: reading others
        can be a SIGBUS."""
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
                f"slab {name!r} has {found.st_size:,} bytes; asked for {num_bytes:,} from byte {offset:,}"
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
                f"slab {name!r} has pages without memory: read it in parts of {ANSWER_BYTES:,} bytes"
            )
        with self._open(name) as fd:
            data = os.pread(fd, num_bytes, offset)
        if len(data) != num_bytes:
            raise CaptureError(f"slab {name!r} shrank while it was read")
        return data

    def _map(self, name: str, found: os.stat_result) -> torch.Tensor:
        """The whole file. Private and never written: a read-only map would make torch warn at
        every look."""
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
        raw = self.raw(region.slab, region.offset, _checked(region))
        if raw.storage_offset() % DTYPES[region.dtype].itemsize:
            raw = raw.clone()
        return _typed(raw, region)


# --- what can be asked ----------------------------------------------------------------


def _read(slabs: _Slabs, region: Region, start: Any, num_bytes: Any) -> Tensors:
    """Bytes of the region from `start`, relative to it."""
    _whole_number(start, "start"), _whole_number(num_bytes, "num_bytes")
    total = _checked(region)
    slabs.check(region.slab, region.offset, total)
    if start + num_bytes > total or num_bytes > ANSWER_BYTES:
        raise ValueError(
            f"the region has {total:,} bytes, an answer at most {ANSWER_BYTES:,}; asked for {num_bytes:,}"
        )
    return (slabs.raw(region.slab, region.offset + start, num_bytes),)


def _slice(slabs: _Slabs, region: Region, index: Any, narrow: Any = None) -> Tensors:
    part = slabs.tensor(region)[_unpack_index(index)]
    if narrow is not None:
        part = part.narrow(*(_whole_number(n, "narrow") for n in narrow))
    if part.nbytes > ANSWER_BYTES:
        raise ValueError(
            f"the slice has {part.nbytes:,} bytes, an answer at most {ANSWER_BYTES:,}: ask for less of it"
        )
    return (part,)


def _reduce(
    slabs: _Slabs, region: Region, name: str, dims: Any, keepdim: bool = False, **more: Any
) -> Tensors:
    value = reduce.partial(name, slabs.tensor(region), dims, keepdim, **more).value()
    return value if isinstance(value, tuple) else (value,)


def _matrix(slabs: _Slabs, region: Region, index: Any) -> torch.Tensor:
    """What is drawn: the region, or a part of it, as rows of its last dim."""
    whole = slabs.tensor(region)
    part = whole if index is None else whole[_unpack_index(index)]
    return part.reshape(-1, part.shape[-1] if part.dim() else 1)


def _sized(size: Any) -> int:
    if _whole_number(size, "the size of a picture", 1) > 1 << 14:
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


# --- the server -----------------------------------------------------------------------


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
                "a data server needs a token: without one, everyone on this host could read the slabs"
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
            f"{interface} can be reached from other hosts: that needs CURVE keys (channel.new_keys())"
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
    _checked(region)
    with torch.no_grad():
        return OPS[request["op"]](slabs, region, **args)


# --- the client -----------------------------------------------------------------------


class Client:
    """Asks a Server. Threads may share it. timeout_s: the longest silence before ClusterError, in
    seconds.

    key: the server's public key, where it has one. A lost connection is made again and what was
    asked is asked again; a read goes on from the chunks it has.
    """

    def __init__(self, address: str, token: str, timeout_s: float = 30, key: bytes | None = None):
        self.address, self._token, self.timeout_s, self._key = address, token, timeout_s, key
        self._context = zmq.Context()
        self._idle: list[_Line] = []
        self._num_busy = 0
        self._lock, self._closed = threading.Lock(), False

    def read(
        self, region: Region, progress: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """The whole region in memory of its own. progress(bytes here, bytes in all) is called
        after each chunk."""
        total = _checked(region)
        here = np.empty(total, dtype=np.uint8)
        starts = range(0, total, CHUNK_BYTES)
        requests = (
            (self._header("read", region, start=s, num_bytes=min(CHUNK_BYTES, total - s)), s)
            for s in starts
        )
        done = 0
        for start, answer in self._ask(requests):
            (chunk,) = _buffers(answer)
            num_bytes = min(CHUNK_BYTES, total - start)
            if len(chunk) != num_bytes:
                raise ClusterError(
                    f"{self.address} sent {len(chunk):,} bytes of {num_bytes:,} that were asked for"
                )
            here[start : start + num_bytes] = chunk
            done += num_bytes
            if progress:
                progress(done, total)
        return _typed(torch.from_numpy(here), region)

    def slice(self, region: Region, index: Any) -> torch.Tensor:
        """region[index], without the rest of it. index: whole numbers, slices, None, ... ."""
        _checked(region)
        packed = _pack_index(index)
        form = torch.empty(region.shape, dtype=DTYPES[region.dtype], device="meta")[
            _unpack_index(packed)
        ]
        if form.is_contiguous():
            offset = region.offset + int(form.storage_offset()) * form.element_size()
            return self.read(Region(region.slab, offset, tuple(form.shape), region.dtype))
        if form.nbytes <= CHUNK_BYTES:
            return self._tensors("slice", region, index=packed)[0]
        return self._large_slice(region, packed, form)

    def _large_slice(self, region: Region, packed: list, form: torch.Tensor) -> torch.Tensor:
        """In parts along its first dim that has any: an engine should not copy gigabytes at
        once."""
        dim = next(d for d, size in enumerate(form.shape) if size > 1)
        step = max(1, CHUNK_BYTES * form.shape[dim] // form.nbytes)
        starts = range(0, form.shape[dim], step)
        narrows = ([dim, start, min(step, form.shape[dim] - start)] for start in starts)
        requests = ((self._header("slice", region, index=packed, narrow=n), n) for n in narrows)
        whole = torch.empty(form.shape, dtype=form.dtype)
        for narrow, answer in self._ask(requests):
            whole.narrow(*narrow).copy_(_unpack(answer)[0])
        return whole

    def reduce(
        self,
        region: Region,
        name: str,
        dims: int | Sequence[int] | None = None,
        keepdim: bool = False,
        **more,
    ):
        """flexkernel.memory.reduce.partial(name, region, dims, keepdim, ...).value(), computed
        over there."""
        found = self._tensors(
            "reduce", region, name=name, dims=_plain(dims), keepdim=keepdim, **more
        )
        return found[0] if len(found) == 1 else found

    def tiles(
        self, region: Region, rows=None, cols=None, height=256, width=512, how="extreme", index=None
    ):
        """flexkernel.memory.reduce.tiles of the region, or of region[index], seen as rows of its
        last dim."""
        packed = None if index is None else _pack_index(index)
        place = {"index": packed, "rows": rows, "cols": cols}
        return self._tensors("tiles", region, **place, height=height, width=width, how=how)[0]

    def bounds(
        self, region: Region, rows=None, cols=None, height=256, width=512, index=None
    ) -> Tensors:
        packed = None if index is None else _pack_index(index)
        return self._tensors(
            "bounds", region, index=packed, rows=rows, cols=cols, height=height, width=width
        )

    def histogram(self, region: Region, lo: float, hi: float, bins: int = 256) -> Histogram:
        counts, rest = self._tensors("histogram", region, lo=lo, hi=hi, bins=bins)
        return Histogram(lo, hi, counts, *rest.tolist())

    def count_nan(self, region: Region, rows=None, cols=None, index=None) -> int:
        packed = None if index is None else _pack_index(index)
        return int(self._tensors("count_nan", region, index=packed, rows=rows, cols=cols)[0])

    def close(self) -> None:
        """Free the connections; those in use when their question is answered."""
        with self._lock:
            self._closed = True
            for line in self._idle:
                line.close()
            self._idle.clear()
            if not self._num_busy:
                self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _header(self, op: str, region: Region, **args: Any) -> dict:
        place = {
            "slab": region.slab,
            "offset": region.offset,
            "shape": [*region.shape],
            "dtype": region.dtype,
        }
        return {"token": self._token, "op": op, **place, "args": args}

    def _tensors(self, op: str, region: Region, **args: Any) -> Tensors:
        ((_, answer),) = self._ask([(self._header(op, region, **args), None)])
        return _unpack(answer)

    def _ask(self, requests) -> Iterator[tuple[Any, list]]:
        """(tag, frames of the answer) for each (header, tag), a few on their way at a time, in any
        order."""
        line, whole = self._take(), False
        try:
            yield from _conversation(line, iter(requests), self.timeout_s)
            whole = True
        finally:
            self._give(line, whole)

    def _take(self) -> _Line:
        """A connection of one's own for one question: zmq sockets are not for several threads at
        once."""
        with self._lock:
            if self._closed:
                raise ClusterError(f"the connection to {self.address} was closed")
            line = self._idle.pop() if self._idle else _Line(self._context, self.address, self._key)
            self._num_busy += 1
            return line

    def _give(self, line: _Line, whole: bool) -> None:
        """whole: every answer came, so the connection can be used again."""
        with self._lock:
            self._num_busy -= 1
            if whole and not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(line)
                return
            line.close()
            if self._closed and not self._num_busy:
                self._context.term()


class _Line:
    """One connection, and the word when it breaks."""

    def __init__(self, context: zmq.Context, address: str, key: bytes | None):
        self._context, self.address, self._key = context, address, key
        self._open()

    def _open(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.ipv6 = "[" in self.address
        if self._key:
            self.socket.curve_serverkey = self._key
            self.socket.curve_publickey, self.socket.curve_secretkey = zmq.curve_keypair()
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self.socket.connect(self.address)

    def wait(self, timeout_s: float) -> list[Any] | None:
        """An answer's frames, none if the connection broke; None: silence for so long."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        if self.socket in ready:
            return self.socket.recv_multipart(copy=False)
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            return []
        return None

    def renew(self) -> None:
        """Whatever was on its way is forgotten with the old socket."""
        self.close()
        time.sleep(RETRY_S)  # a server that hangs up at once would be asked in a hot loop
        self._open()

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)


_ids = iter(range(1, 2**62))


def _conversation(
    line: _Line, requests: Iterator[tuple[dict, Any]], timeout_s: float
) -> Iterator[tuple[Any, list]]:
    """Keeps PIPELINE requests on their way; asks again for what a broken connection lost."""
    waiting: dict[int, tuple[bytes, Any]] = {}

    def ask_more() -> None:
        for header, tag in requests:
            number = next(_ids)
            text = json.dumps({**header, "id": number}).encode()
            if len(text) > REQUEST_BYTES:
                raise ClusterError(
                    f"a request has at most {REQUEST_BYTES:,} bytes, this one {len(text):,}"
                )
            waiting[number] = text, tag
            line.socket.send(text)
            if len(waiting) >= PIPELINE:
                break

    ask_more()
    until = time.monotonic() + timeout_s
    while waiting:
        answer = line.wait(until - time.monotonic())
        if answer is None:
            raise ClusterError(_silence(line.address, timeout_s))
        if not answer:
            line.renew()
            for text, _ in waiting.values():
                line.socket.send(text)
        elif (number := _number(answer)) in waiting:
            _, tag = waiting.pop(number)
            until = time.monotonic() + timeout_s
            ask_more()
            yield tag, answer


def _silence(address: str, timeout_s: float) -> str:
    return (
        f"no answer from the data server at {address} for {timeout_s:g} s: its engine has died or is stopped, or its "
        "token or key is another one; session.status() shows which engines live, and %flex_cluster attach asks anew"
    )


def _number(answer: list) -> int:
    """Which request an answer is to, 0 for none: answers to questions that nobody waits for any
    more come too."""
    try:
        return int(json.loads(answer[0].buffer.tobytes()).get("id"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return 0


def _buffers(answer: list) -> list[np.ndarray]:
    """An answer's raw buffers, not copied; raises the error that it tells of."""
    header = _head(answer)
    if header.get("status") != "ok":
        raise _error(str(header.get("type")), str(header.get("message")))
    return [np.frombuffer(frame.buffer, dtype=np.uint8) for frame in answer[1:]]


def _head(answer: list) -> dict[str, Any]:
    """An answer's header. ClusterError: what answers there is no data server of ours."""
    try:
        header = json.loads(answer[0].buffer.tobytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ClusterError(
            f"an answer of {answer[0].buffer.nbytes:,} bytes has no header: ask %flex_cluster status"
        )
    return header


def _unpack(answer: list) -> Tensors:
    """The tensors of an answer, in memory of their own."""
    buffers = _buffers(answer)
    forms = _head(answer).get("tensors")
    if not isinstance(forms, list) or len(forms) != len(buffers):
        raise ClusterError(f"an answer says {str(forms)[:80]} and has {len(buffers)} buffers")
    tensors = []
    for form, raw in zip(forms, buffers, strict=True):
        try:
            region = Region("answer", 0, tuple(form["shape"]), form["dtype"])
            fits = _checked(region) == len(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ClusterError(
                f"an answer says {str(form)[:80]}, which is no tensor: {error}"
            ) from None
        if not fits:
            raise ClusterError(f"an answer says {form} and has {len(raw):,} bytes")
        tensors.append(_typed(torch.from_numpy(raw.copy()), region))
    return tuple(tensors)


def _error(kind: str, message: str) -> Exception:
    """The server's error as the caller knows it: ours, or what torch's indexing raises here
    too."""
    plain = {"IndexError": IndexError, "TypeError": TypeError, "ValueError": ValueError}
    if kind in plain:
        return plain[kind](message)
    found = named(kind)
    return found(message) if found is not named("FlexError") else FlexError(f"{kind}: {message}")


def _plain(dims: Any) -> Any:
    return dims if dims is None or isinstance(dims, int) else [int(d) for d in dims]
