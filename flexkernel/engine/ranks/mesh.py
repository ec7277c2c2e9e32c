"""This rank among the others: the rendezvous store, the process groups, and their generation.

A generation is one life of the groups. Each has its own prefix in the store, so that nothing of a
broken generation affects it."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from flexkernel.engine.compat import abort_groups
from flexkernel.errors import LoadError
from flexkernel.wire import RankInfo

__all__ = ["gpu_of", "join", "leave", "open_store", "set_device"]

JOIN_S = 60.0  # the least time that ranks have to join


def open_store(
    folder: Path, generation: int, interface: str = "127.0.0.1"
) -> tuple[str, int, dist.Store | None]:
    """Open a rendezvous store: (address, port, the object that must live as long as the store).

    On loopback the store is a file in this user's private folder, with port 0 and no object. A
    TCPStore has no password, so anybody on this machine could write to it. Elsewhere it is a
    TCPStore in this process that listens on that interface only; by default it would listen on
    all."""
    if ipaddress.ip_address(interface).is_loopback:
        for path in folder.glob("store-*"):  # of earlier generations
            path.unlink(missing_ok=True)
        return str(folder / f"store-{generation}"), 0, None
    family = socket.AF_INET6 if ":" in interface else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((interface, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        interface,
        port,
        None,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return interface, port, store


def join(rank_info: RankInfo, address: str, port: int, device: str, timeout_s: float) -> dist.Store:
    """Initialise this generation's default group; returns this rank's client of the store. All
    ranks must call.

    address, port: from open_store() on the rank that called it."""
    if port == 0:
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    # by default NCCL ends the process, and the model with it, if a collective or its watcher hangs
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    store: dist.Store
    if port == 0:
        store = dist.FileStore(address, rank_info.world)
    else:
        store = dist.TCPStore(address, port, None, is_master=False)
    store.set_timeout(timedelta(seconds=JOIN_S))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(f"generation-{rank_info.generation}", store),
        rank=rank_info.rank,
        world_size=rank_info.world,
        # longer than the watch's timeout: the watch knows more, so it should report first. Ranks
        # may also join slowly, whatever a run's timeout is
        timeout=timedelta(seconds=max(timeout_s, JOIN_S) + 15),
    )
    return store


def leave() -> None:
    """Drop all groups of this process, whatever their state."""
    abort_groups()


def set_device(rank_info: RankInfo, device: str) -> None:
    """Set this rank's number of threads and its own GPU. Call it before anything is put on a GPU.

    A world of one rank is the user's own process: its threads and GPU are the user's choice.
    LoadError: there is no GPU for this rank."""
    index = rank_info.local_rank
    if device == "cuda":
        index = gpu_of(rank_info.local_rank, torch.cuda.device_count())
    if rank_info.world == 1:
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if device == "cuda":
        torch.cuda.set_device(index)
    os.environ.update(
        RANK=str(rank_info.rank), WORLD_SIZE=str(rank_info.world), LOCAL_RANK=str(index)
    )


def gpu_of(local_rank: int, count: int) -> int:
    """The index of an engine's GPU among the `count` GPUs that it sees. LoadError: there are too
    few.

    It is the engine's number on its host, or 0 if a launcher shows each engine only its own GPU.

    >>> gpu_of(2, 4), gpu_of(2, 1)
    (2, 0)
    """
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise LoadError(
        f"device='cuda': engine {local_rank} of its host, counted from 0, sees {count} GPUs; start "
        "no more than "
        "there are in CUDA_VISIBLE_DEVICES, or load with device='cpu'"
    )
