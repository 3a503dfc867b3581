"""Stand-in for transformers' tests/distributed_testing_utils.py, which its sdist lacks: CPU processes, by gloo."""

import functools
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(_rank):
    return torch.device("cpu")


def _set_rank_device(_rank):
    torch.set_num_threads(1)


def _start_rank_processes(fn, args, nprocs):
    mp.spawn(fn, args=args, nprocs=nprocs)


def _rank_main(rank, fn, args, world_size, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    try:
        fn(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """Decorator: calls `fn(rank, *args)` in `world_size` processes."""

    def decorate(fn):
        @functools.wraps(fn)
        def run(*args):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            mp.spawn(_rank_main, args=(fn, args, world_size, port), nprocs=world_size)

        return run

    return decorate
