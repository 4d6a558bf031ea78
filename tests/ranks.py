"""Two gloo processes for the tests: `run(function)` is what function(rank) returned on each of them."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run(function) -> list:
    """What a module's function(rank) returned, rank by rank; an exception on a rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_body, (function, folder), nprocs=WORLD)
        files = [Path(folder) / f"{rank}.pt" for rank in range(WORLD)]
        return [torch.load(file, weights_only=True) for file in files]


def _body(rank, function, folder):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "init_method": f"file://{folder}/store"}
    dist.init_process_group("gloo", **options)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves early takes the connections of the other with it
    finally:
        dist.destroy_process_group()
