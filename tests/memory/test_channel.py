"""The data plane over real sockets: a serving thread and its clients."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexkernel.errors import CaptureError, ClusterError, FlexError
from flexkernel.memory import reduce
from flexkernel.memory.channel import CHUNK_BYTES, DTYPES, new_keys
from flexkernel.memory.client import Client, _error
from flexkernel.memory.server import OPS, Server, _Slabs
from flexkernel.wire import Region
from tests.support.waiting import until

TOKEN = "a-token"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slabs")


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, TOKEN) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.address, TOKEN, timeout_s=10) as client:
        yield client


def put(folder, tensor: torch.Tensor, name: str = "a.slab", offset: int = 0) -> Region:
    """The tensor in a slab file, allocated as slabs are."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, max(offset + len(raw), 1))
    os.pwrite(fd, raw, offset)
    os.close(fd)
    return Region(name, offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def ask(server, header: dict | bytes, wait_ms: int = 2000) -> dict | None:
    """One request by a plain socket; None where nothing is answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(server.address)
        dealer.send(header if isinstance(header, bytes) else json.dumps(header).encode())
        return json.loads(dealer.recv_multipart()[0]) if dealer.poll(wait_ms) else None


# Values


@pytest.mark.parametrize("offset", [0, 4096, 13])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_bit_for_bit_from_any_byte(dtype, offset, folder, client):
    values = torch.randint(
        0, 2 if dtype == "bool" else 256, (3 * 5 * DTYPES[dtype].itemsize,), dtype=torch.uint8
    )
    tensor = values.view(DTYPES[dtype]).view(3, 5)
    region = put(folder, tensor, f"{dtype}-{offset}.slab", offset)
    got = client.read(region)
    assert got.dtype == DTYPES[dtype] and got.shape == (3, 5) and raw(got) == raw(tensor)
    assert raw(client.slice(region, (slice(None), slice(1, 4, 2)))) == raw(tensor[:, 1:4:2])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 7)])
def test_shapes_of_nothing_and_of_one(shape, folder, client):
    region = put(folder, torch.ones(shape), f"shape{len(shape)}-{sum(shape)}.slab")
    assert torch.equal(client.read(region), torch.ones(shape))
    assert torch.equal(client.slice(region, ...), torch.ones(shape))


def test_a_region_of_several_chunks_arrives_whole_and_says_how_far_it_is(folder, client):
    tensor = torch.arange(5 * CHUNK_BYTES // 4 + 3, dtype=torch.int32)
    region, seen = put(folder, tensor, "large.slab", 4096), []
    got = client.read(region, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(got, tensor)
    assert len(seen) == 6 and seen == sorted(seen) and seen[-1] == (tensor.nbytes, tensor.nbytes)


def test_what_was_read_is_the_readers_own(folder, client):
    region = put(folder, torch.ones(8), "own.slab")
    client.read(region).zero_()
    client.slice(region, slice(2)).zero_()
    assert torch.equal(client.read(region), torch.ones(8))


@pytest.mark.parametrize(
    "index",
    [
        0,
        (0, -1, slice(None, 4)),
        (slice(None), 1),
        (..., 2),
        (None, slice(1, None), ..., slice(0, 6, 3)),
        slice(5, 1),
        (slice(-2, None), slice(-100, 100)),
        np.int64(1),
        (torch.tensor(1), ...),
    ],
    ids=str,
)
def test_an_index_means_what_it_means_in_torch(index, folder, client):
    tensor = torch.randn(3, 5, 7)
    region = put(folder, tensor, "index.slab")
    assert torch.equal(client.slice(region, index), tensor[index])


def test_a_large_slice_comes_in_parts(folder, client):
    tensor = torch.arange(2 * CHUNK_BYTES, dtype=torch.int32).view(1, 4, -1, 8)
    region = put(folder, tensor, "large-slice.slab")
    assert torch.equal(client.slice(region, (..., slice(0, 7))), tensor[..., :7])
    assert torch.equal(
        client.slice(region, (0, slice(None), slice(5, None), 1)), tensor[0, :, 5:, 1]
    )


@pytest.mark.parametrize("index", [[0, 1], True, torch.tensor([0]), "a", (0, [1])], ids=str)
def test_an_index_that_is_no_slice_is_refused_with_the_way_out(index, folder, client):
    with pytest.raises(TypeError, match=r"\.tensor\(\) first"):
        client.slice(put(folder, torch.ones(3), "refuse.slab"), index)


def test_an_index_out_of_range_is_an_index_error(folder, client):
    with pytest.raises(IndexError):
        client.slice(put(folder, torch.ones(3), "range.slab"), 3)


# Reductions, computed over there


@pytest.mark.parametrize(
    ("name", "dims"), [("norm", -1), ("mean", [0, 1]), ("var", None), ("amax", 0), ("amin", (1,))]
)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reduction_equals_the_one_made_here(name, dims, keepdim, dtype, folder, client):
    tensor = torch.randn(3, 5, 7).to(dtype)
    here = reduce.partial(name, tensor, dims, keepdim).value()
    assert torch.equal(client.reduce(put(folder, tensor, "reduce.slab"), name, dims, keepdim), here)


def test_topk_gives_values_and_indices(folder, client):
    tensor = torch.randn(4, 50)
    values, indices = client.reduce(put(folder, tensor, "topk.slab"), "topk", -1, k=3)
    expected = tensor.topk(3)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


def test_pictures_and_counts_equal_those_made_here(folder, client):
    tensor = torch.randn(2, 40, 60)
    tensor[0, 3, 5] = torch.nan
    region, matrix = put(folder, tensor, "tiles.slab"), tensor.reshape(-1, 60)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(
        client.tiles(region, height=8, width=9), reduce.tiles(matrix, height=8, width=9), **same
    )
    part = reduce.tiles(tensor[1], (3, 30), (0, 7), 4, 4, "mean")
    torch.testing.assert_close(
        client.tiles(region, (3, 30), (0, 7), 4, 4, "mean", index=1), part, **same
    )
    for got, expected in zip(client.bounds(region), reduce.bounds(matrix), strict=True):
        torch.testing.assert_close(got, expected, **same)
    got, expected = client.histogram(region, -1, 1, 16), reduce.histogram(tensor, -1, 1, 16)
    assert torch.equal(got.counts, expected.counts)
    assert (got.below, got.above, got.nan) == (expected.below, expected.above, 1)
    assert client.count_nan(region) == 1 and client.count_nan(region, index=1) == 0


def test_a_reduction_that_does_not_exist_names_those_that_do(folder, client):
    with pytest.raises(ValueError, match=r"no reduction 'nrom'; there are .*norm"):
        client.reduce(put(folder, torch.ones(3), "no.slab"), "nrom")


# What is refused


def test_a_wrong_token_gets_no_answer_and_the_client_says_what_to_do(folder, server):
    region = put(folder, torch.ones(3), "token.slab")
    with Client(server.address, "another", timeout_s=0.3) as client:
        start = time.monotonic()
        with pytest.raises(
            ClusterError, match=r"no answer from .* for 0.3 s: .* token .* session.status"
        ):
            client.read(region)
    assert time.monotonic() - start < 2


def test_a_server_that_is_not_there_ends_the_wait():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        Client(f"tcp://127.0.0.1:{port}", TOKEN, timeout_s=0.3) as client,
        pytest.raises(ClusterError, match="no answer"),
    ):
        client.read(Region("a.slab", 0, (1,), "bool"))


def test_an_empty_token_is_refused(folder):
    with pytest.raises(ClusterError, match="needs a token"):
        Server(folder, "")


@pytest.mark.parametrize("interface", ["0.0.0.0", "::", "*", "eth0", "10.1.2.3", "192.168.0.1", ""])
def test_only_loopback_is_served_without_keys(interface, folder):
    with pytest.raises(ClusterError, match=r"interface|CURVE"):
        Server(folder, TOKEN, interface)


def test_keys_encrypt_and_a_client_without_them_gets_nothing(folder):
    region = put(folder, torch.arange(5.0), "curve.slab")
    keys = new_keys()
    with Server(folder, TOKEN, keys=keys) as server:
        with Client(server.address, TOKEN, key=server.public_key, timeout_s=10) as client:
            assert torch.equal(client.read(region), torch.arange(5.0))
        for key in (None, new_keys()[0]):
            with (
                Client(server.address, TOKEN, key=key, timeout_s=0.4) as client,
                pytest.raises(ClusterError),
            ):
                client.read(region)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\0b", "link.slab", "sub"],
)
def test_only_regular_files_of_the_folder_are_served(name, folder, server):
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / "sub").mkdir(exist_ok=True)
    (folder / ".hidden").write_bytes(b"hidden")
    if not (folder / "link.slab").is_symlink():
        (folder / "link.slab").symlink_to(folder.parent / "secret")
    request = {
        "op": "read",
        "offset": 0,
        "shape": [1],
        "dtype": "uint8",
        "args": {"start": 0, "num_bytes": 1},
    }
    answer = ask(server, {"token": TOKEN, "slab": name, **request})
    assert answer and answer["status"] == "error" and "slab" in answer["message"]


def test_a_pipe_in_the_folder_does_not_hang_the_server(folder, server, client):
    os.mkfifo(folder / "pipe.slab")
    with pytest.raises(CaptureError, match="not a slab of this user"):
        client.read(Region("pipe.slab", 0, (1,), "uint8"))


BIG = 2**62
BAD_REQUESTS = {
    "unknown op": {"op": "exec"},
    "op of another type": {"op": ["read"]},
    "negative offset": {"offset": -1},
    "offset past the end": {"offset": 1 << 40},
    "offset of a float": {"offset": 0.0},
    "negative dim": {"shape": [-4]},
    "boolean dim": {"shape": [True]},
    "huge dim": {"shape": [BIG]},
    "product that overflows": {"shape": [BIG, BIG, BIG]},
    "dim beyond int64": {"shape": [10**400]},
    "too many dims": {"shape": [1] * 65},
    "shape that is none": {"shape": 2**31},
    "shape too large for the file": {"shape": [1 << 30]},
    "nothing, hugely": {"op": "slice", "shape": [0, BIG, BIG], "args": {"index": []}},
    "unknown dtype": {"dtype": "qint8"},
    "dtype that torch has": {"dtype": "load"},
    "no dtype": {"dtype": None},
    "args that are none": {"args": [1]},
    "args it does not take": {"args": {"start": 0, "num_bytes": 4, "slabs": 1}},
    "bytes past the region": {"args": {"start": 8, "num_bytes": 100}},
    "negative bytes": {"args": {"start": 0, "num_bytes": -1}},
    "index of text": {"op": "slice", "args": {"index": ["__class__"]}},
    "index that is none": {"op": "slice", "args": {"index": {"a": 1}}},
    "index beyond": {"op": "slice", "args": {"index": [99]}},
    "step of zero": {"op": "slice", "args": {"index": [[0, 4, 0]]}},
    "step backwards": {"op": "slice", "args": {"index": [[None, None, -1]]}},
    "narrow of three texts": {"op": "slice", "args": {"index": [], "narrow": ["a", "b", "c"]}},
    "picture too large": {
        "op": "tiles",
        "args": dict.fromkeys(["rows", "cols", "index"]) | {"height": BIG, "width": 9},
    },
    "endless bins": {"op": "histogram", "args": {"lo": 0, "hi": 1, "bins": BIG}},
    "dims of text": {"op": "reduce", "args": {"name": "norm", "dims": "all"}},
    "k below zero": {"op": "reduce", "args": {"name": "topk", "dims": 0, "k": -1}},
}


@pytest.mark.parametrize("bad", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_senseless_request_gets_an_error_and_the_next_an_answer(bad, folder, server):
    put(folder, torch.arange(4.0), "bad.slab")
    good = {
        "token": TOKEN,
        "op": "read",
        "slab": "bad.slab",
        "offset": 0,
        "shape": [4],
        "dtype": "float32",
    }
    good["args"] = {"start": 0, "num_bytes": 16}
    answer = ask(server, {**good, **bad})
    assert answer and answer["status"] == "error" and answer["message"]
    assert ask(server, good)["status"] == "ok"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 60000,
        b'{"token": 5}',
        b'{"token": "\\ud800"}',
        b'{"token": null}',
    ],
    ids=lambda frame: ascii(frame[:12]),
)
def test_what_is_no_request_gets_no_answer(frame, server):
    assert ask(server, frame, wait_ms=50) is None


def test_a_file_that_shrinks_or_goes_is_an_error_and_no_crash(folder, client):
    region = put(folder, torch.arange(5000.0), "shrink.slab")
    assert client.read(region)[4999] == 4999
    os.truncate(folder / "shrink.slab", 4096)
    with pytest.raises(CaptureError, match="has 4,096 bytes; asked for 20,000"):
        client.read(region)
    os.unlink(folder / "shrink.slab")
    with pytest.raises(CaptureError, match="not there any more"):
        client.read(region)


def test_a_slab_written_again_or_made_anew_is_read_as_it_is_now(folder, client):
    region = put(folder, torch.ones(1000), "again.slab")
    assert client.read(region).sum() == 1000
    put(folder, torch.full((1000,), 2.0), "again.slab")
    assert client.read(region).sum() == 2000
    os.unlink(folder / "again.slab")
    put(folder, torch.full((1000,), 3.0), "again.slab")
    assert client.read(region).sum() == 3000
    larger = put(folder, torch.full((5000,), 4.0), "again.slab")
    assert client.read(larger).sum() == 20000


def test_pages_without_memory_are_read_without_a_map(folder, client):
    with open(folder / "sparse.slab", "wb") as file:
        file.truncate(1 << 20)
    assert client.read(Region("sparse.slab", 0, (1 << 18,), "float32")).abs().max() == 0


def test_maps_of_removed_files_are_dropped(folder):
    put(folder, torch.ones(4), "gone.slab")
    slabs = _Slabs(os.open(folder, os.O_RDONLY))
    assert slabs.raw("gone.slab", 0, 16).sum() and list(slabs.maps) == ["gone.slab"]
    os.unlink(folder / "gone.slab")
    slabs.forget_gone()
    assert not slabs.maps
    os.close(slabs.folder)


# Fuzz


def still_serves(server, folder) -> bool:
    region = put(folder, torch.arange(3.0), "fuzz.slab")
    with Client(server.address, TOKEN, timeout_s=10) as client:
        return torch.equal(client.read(region), torch.arange(3.0))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*DTYPES, "fuzz.slab"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ARGS = [
    *(
        "start",
        "num_bytes",
        "index",
        "narrow",
        "name",
        "dims",
        "keepdim",
        "rows",
        "cols",
        "height",
        "width",
        "how",
    ),
    *("lo", "hi", "bins", "k", "largest", "offset", "slabs", "region"),
]
REQUESTS = st.fixed_dictionaries(
    {"token": st.just(TOKEN), "op": st.sampled_from(sorted(OPS)) | JSON},
    optional={
        "slab": st.just("fuzz.slab") | JSON,
        "offset": st.integers(0, 16) | JSON,
        "shape": st.lists(st.integers(0, 3), max_size=4) | JSON,
        "dtype": st.sampled_from(sorted(DTYPES)) | JSON,
        "args": st.dictionaries(st.sampled_from(ARGS), st.integers(-2, 9) | JSON, max_size=6)
        | JSON,
        "id": JSON,
    },
)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_any_json_with_the_token_gets_an_answer(server, folder, requests):
    put(folder, torch.arange(64.0), "fuzz.slab")
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(server.address)
        for request in requests:
            dealer.send(json.dumps(request).encode())
        for _ in requests:
            assert dealer.poll(10_000), requests
            assert json.loads(dealer.recv_multipart()[0])["status"] in ("ok", "error")


def test_random_frames_and_random_bytes_leave_the_server_serving(server, folder):
    rng = random.Random(0)
    host, port = server.address.removeprefix("tcp://").split(":")
    with zmq.Context() as context:
        for _ in range(60):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 100
                dealer.connect(server.address)
                for _ in range(5):
                    dealer.send_multipart(
                        [
                            rng.randbytes(rng.choice([0, 3, 100, 100_000]))
                            for _ in range(rng.randint(1, 5))
                        ]
                    )
            with socket.create_connection((host, int(port))) as plain:
                plain.sendall(
                    rng.choice([b"", b"\xff" + bytes(8) + b"\x01\x7f"])
                    + rng.randbytes(rng.randint(0, 500))
                )
    assert still_serves(server, folder)


def test_two_hundred_idle_connections_are_in_nobodys_way(server, folder):
    host, port = server.address.removeprefix("tcp://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(200)]
    assert still_serves(server, folder)
    for connection in idle:
        connection.close()
    assert still_serves(server, folder)


# Clients and time


def test_two_clients_and_several_threads_of_one_read_at_the_same_time(folder, server):
    tensors = [torch.randn(3 * CHUNK_BYTES // 4 + i) for i in range(4)]
    regions = [put(folder, tensor, f"thread{i}.slab") for i, tensor in enumerate(tensors)]
    wrong = []
    with Client(server.address, TOKEN) as one, Client(server.address, TOKEN) as two:

        def work(client, i):
            for _ in range(3):
                if (
                    not torch.equal(client.read(regions[i]), tensors[i])
                    or client.slice(regions[i], 5) != tensors[i][5]
                ):
                    wrong.append(i)

        threads = [
            threading.Thread(target=work, args=(client, i))
            for i in range(4)
            for client in (one, two)
        ]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_question_inside_a_progress_callback_is_answered(folder, client):
    region = put(folder, torch.ones(2 * CHUNK_BYTES // 4), "nested.slab")
    seen = []
    client.read(region, progress=lambda *_: seen.append(client.slice(region, 0).item()))
    assert seen == [1.0, 1.0]


def test_a_callback_that_raises_leaves_the_client_usable(folder, client):
    region = put(folder, torch.ones(6 * CHUNK_BYTES // 4), "raise.slab")
    with pytest.raises(ZeroDivisionError):
        client.read(region, progress=lambda *_: 1 / 0)
    assert client.slice(region, 0) == 1 and client.read(region).sum() == len(client.read(region))


def test_a_read_goes_on_after_the_server_came_back(folder):
    tensor = torch.arange(6 * CHUNK_BYTES // 4, dtype=torch.int32)
    region, seen = put(folder, tensor, "resume.slab"), []
    server = Server(folder, TOKEN)
    port = int(server.address.rsplit(":", 1)[1])

    def restart(done, _):
        nonlocal server
        seen.append(done)
        if len(seen) == 2:
            server.close()
            server = Server(folder, TOKEN, port=port)

    with Client(server.address, TOKEN, timeout_s=10) as client:
        assert torch.equal(client.read(region, progress=restart), tensor)
        assert len(seen) == 6, "no chunk is fetched twice"
        server.close()
        server = Server(folder, TOKEN, port=port)
        assert client.slice(region, 7) == 7, "an idle connection notices too"
    server.close()


@pytest.mark.slow
def test_the_server_answers_while_the_main_thread_computes(folder, server):
    region = put(folder, torch.ones(65536), "busy.slab")
    script = (
        "import sys, torch; from flexkernel.memory.client import Client;"
        "from flexkernel.wire import Region;"
        "c = Client(sys.argv[1], sys.argv[2], timeout_s=10);"
        "print(sum(c.slice(Region('busy.slab', 0, (65536,), 'float32'), slice(None)).sum().item() "
        "for _ in range(20)))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, server.address, TOKEN], stdout=subprocess.PIPE, text=True
    )
    matrix = torch.randn(300, 300)
    while other.poll() is None:
        matrix = (matrix @ matrix).clamp(-1, 1)
    assert float(other.stdout.read()) == 20 * 65536
    assert region.shape == (65536,)


# Closing


def test_close_frees_port_thread_descriptors_and_maps(folder):
    region = put(folder, torch.ones(1000), "close.slab")

    def once():
        with Server(folder, TOKEN) as server, Client(server.address, TOKEN) as client:
            assert client.read(region).sum() == 1000
        return server

    def held() -> tuple[int, int, int]:
        gc.collect()
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            open("/proc/self/maps").read().count("close.slab"),
        )

    threads = threading.active_count()
    once()
    until(lambda: threading.active_count() == threads)
    before = held()
    assert before[2] == 0
    for _ in range(20):
        server = once()
    until(lambda: held() == before)
    server.close()
    host, port = server.address.removeprefix("tcp://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=2)


def test_a_closed_client_says_so(server):
    client = Client(server.address, TOKEN)
    client.close()
    client.close()
    with pytest.raises(ClusterError, match="was closed"):
        client.read(Region("a.slab", 0, (1,), "bool"))


@pytest.mark.slow
def test_a_process_that_closes_nothing_still_ends(folder):
    script = (
        "import sys; from flexkernel.memory.client import Client;"
        "from flexkernel.memory.server import Server; from flexkernel.wire import Region;"
        "s = Server(sys.argv[1], 't'); c = Client(s.address, 't');"
        "print(c.read(Region('end.slab', 0, (3,), 'float32')).sum().item())"
    )
    put(folder, torch.ones(3), "end.slab")
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "3.0\n", done.stderr


def test_a_port_that_is_taken_is_a_cluster_error(server, folder):
    with pytest.raises(ClusterError, match="cannot serve slabs"):
        Server(folder, TOKEN, port=int(server.address.rsplit(":", 1)[1]))


def test_errors_keep_their_type_over_the_wire():
    assert isinstance(_error("CaptureExpired", "x"), CaptureError)
    assert isinstance(_error("IndexError", "x"), IndexError)
    strange = _error("SystemExit", "x")
    assert isinstance(strange, FlexError) and "x" in str(strange)
