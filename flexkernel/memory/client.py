"""Client: reads and reduces the slabs that a Server on another host serves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from flexkernel.errors import ClusterError, FlexError, named
from flexkernel.wire import Region

from .channel import (
    CHUNK_BYTES,
    DTYPES,
    REQUEST_BYTES,
    Tensors,
    checked_bytes,
    pack_index,
    typed,
    unpack_index,
)
from .reduce import Histogram

__all__ = ["Client"]

PIPELINE = 4  # chunks asked for and not yet here
MAX_IDLE = 4  # connections that a client keeps
RETRY_S = 0.05


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
        """The whole region, of its shape and dtype, on the CPU in memory of its own.

        progress(bytes here, bytes in all) is called after each chunk. ClusterError: the server is
        silent for timeout_s, or sends other bytes than these. CaptureError: the slab is gone, or
        is shorter. ValueError: the region has no such dtype, shape or offset."""
        total = checked_bytes(region)
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
        return typed(torch.from_numpy(here), region)

    def slice(self, region: Region, index: Any) -> torch.Tensor:
        """region[index], without the rest of it: of that shape and the region's dtype, on the CPU
        in memory of its own.

        index: whole numbers, slices, None, ... . TypeError: something else, such as a mask.
        IndexError: it is outside the shape. Other errors are those of read()."""
        checked_bytes(region)
        packed = pack_index(index)
        form = torch.empty(region.shape, dtype=DTYPES[region.dtype], device="meta")[
            unpack_index(packed)
        ]
        if form.is_contiguous():
            offset = region.offset + int(form.storage_offset()) * form.element_size()
            return self.read(Region(region.slab, offset, tuple(form.shape), region.dtype))
        if form.nbytes <= CHUNK_BYTES:
            return self._tensors("slice", region, index=packed)[0]
        return self._large_slice(region, packed, form)

    def _large_slice(self, region: Region, packed: list, form: torch.Tensor) -> torch.Tensor:
        """The slice, of form's shape and dtype, on the CPU. It is fetched in parts along its first
        dim of more than 1: an engine should not copy gigabytes at once.

        form: region[index] on the meta device; packed: that index. Errors are those of read()."""
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
        over there.

        A tensor of the region's shape without dims (of size 1 there with keepdim), on the CPU;
        for "topk" two, values and indices. Errors are those of read(), and torch's."""
        found = self._tensors(
            "reduce", region, name=name, dims=_plain(dims), keepdim=keepdim, **more
        )
        return found[0] if len(found) == 1 else found

    def tiles(
        self, region: Region, rows=None, cols=None, height=256, width=512, how="extreme", index=None
    ):
        """flexkernel.memory.reduce.tiles of the region, or of region[index], seen as rows of its
        last dim: (h, w) float32 on the CPU, h <= height, w <= width.

        rows, cols: (start, stop) of what is drawn. Errors are those of slice()."""
        packed = None if index is None else pack_index(index)
        place = {"index": packed, "rows": rows, "cols": cols}
        return self._tensors("tiles", region, **place, height=height, width=width, how=how)[0]

    def bounds(
        self, region: Region, rows=None, cols=None, height=256, width=512, index=None
    ) -> Tensors:
        """The "max" and the "min" tile of the same pixels: two (h, w) float32, as of tiles()."""
        packed = None if index is None else pack_index(index)
        return self._tensors(
            "bounds", region, index=packed, rows=rows, cols=cols, height=height, width=width
        )

    def histogram(self, region: Region, lo: float, hi: float, bins: int = 256) -> Histogram:
        """flexkernel.memory.reduce.histogram of the region; its counts: (bins,) int64."""
        counts, rest = self._tensors("histogram", region, lo=lo, hi=hi, bins=bins)
        return Histogram(lo, hi, counts, *rest.tolist())

    def count_nan(self, region: Region, rows=None, cols=None, index=None) -> int:
        packed = None if index is None else pack_index(index)
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
        """What one request is answered: tensors of the shapes and dtypes that the answer says, on
        the CPU in memory of their own."""
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
        f"no answer from the data server at {address} for {timeout_s:g} s: "
        "its engine has died or is stopped, or its "
        "token or key is another one; session.status() shows which engines live, "
        "and %flex_cluster attach asks anew"
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
            f"an answer of {answer[0].buffer.nbytes:,} bytes has no header: "
            "ask %flex_cluster status"
        )
    return header


def _unpack(answer: list) -> Tensors:
    """The tensors of an answer, of the shapes and dtypes that its header says, on the CPU in
    memory of their own. ClusterError: header and buffers disagree. Raises the error that the
    answer reports."""
    buffers = _buffers(answer)
    forms = _head(answer).get("tensors")
    if not isinstance(forms, list) or len(forms) != len(buffers):
        raise ClusterError(f"an answer says {str(forms)[:80]} and has {len(buffers)} buffers")
    tensors = []
    for form, raw in zip(forms, buffers, strict=True):
        try:
            region = Region("answer", 0, tuple(form["shape"]), form["dtype"])
            fits = checked_bytes(region) == len(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ClusterError(
                f"an answer says {str(form)[:80]}, which is no tensor: {error}"
            ) from None
        if not fits:
            raise ClusterError(f"an answer says {form} and has {len(raw):,} bytes")
        tensors.append(typed(torch.from_numpy(raw.copy()), region))
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
