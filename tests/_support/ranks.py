"""Gloo processes for the tests: functions (`run`) and the command line (`commands`), on forks of one process.

Of commands one test uses torchrun itself; others get its environment.
"""

import gc
import os
import socket
import tempfile
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
# Imported once, by a process without threads that every rank is a fork of.
FORKED = ("fastrlhf.train.runtime", "fastrlhf.ops._backend", "pytest", "torch.distributed.fsdp")


def run(function, world: int = WORLD) -> list:
    """What a module's function(rank) returned, rank by rank; an exception on a rank is raised here."""
    mp.set_forkserver_preload([*FORKED])
    with tempfile.TemporaryDirectory() as folder:
        given = (function, folder, world)
        mp.start_processes(_body, given, nprocs=world, start_method="forkserver")
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=True) for file in files]


def _body(rank, function, folder, world):
    gc.freeze()  # the imported modules, which no rank frees
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world, "init_method": f"file://{folder}/store"}
    dist.init_process_group("gloo", **options)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves early takes the connections of the other with it
    finally:
        dist.destroy_process_group()


def commands(*lines, ranks=WORLD, **environment):
    """Run command lines of fastrlhf one after the other in one group, as in torchrun: returncode, stdout, stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **environment}
    fork = mp.get_context("forkserver").Process
    mp.set_forkserver_preload([*FORKED])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            place = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            place = {**os.environ, **{k: str(v) for k, v in place.items()}}
            started.append(fork(target=_commands, args=(place, lines, folder)))
            started[-1].start()
        left = {process.sentinel: process for process in started}
        while left:  # as torchrun does: the first that fails ends the others
            ended = connection.wait(left, timeout=600)
            failed = not ended or any(left.pop(sentinel).exitcode for sentinel in ended)
            if failed:
                for process in left.values():
                    process.terminate()
        said = {
            stream: "".join(
                (Path(folder) / f"{stream}.{rank}").read_text() for rank in range(ranks)
            )
            for stream in ("stdout", "stderr")
        }
        status = max(abs(process.exitcode) for process in started)
        return SimpleNamespace(returncode=status, **said)


def _commands(environment, lines, folder):
    from _support.stage_runs import stages
    from fastrlhf.cli import end

    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(folder) / f"{stream}.{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    end(stages(lines))
