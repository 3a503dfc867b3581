"""One of the processes that `torchrun` starts: connects to the other, trains a little and lets go, again and again.

torchrun --nproc_per_node 2 tests/ending_worker.py FOLDER TIMES
"""

import os
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from finetune.processes import begin, end


def train(meeting_point: str) -> None:
    """Forward and backward of one layer, whose gradients DDP's reducer, freed with the model, averages by gloo."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
    state = begin()
    assert state.num_processes == world_size
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    end(state)


def main(folder: str, times: int) -> None:
    for number in range(times):
        train(f"{folder}/{number}")
        PartialState._reset_state()
    print(f"ended {times} times", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
