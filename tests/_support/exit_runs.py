"""Exits of two-rank runs while a thread of the process group still has Python code to run.

    python tests/_support/exit_runs.py [runs]

A thread that requests the GIL during interpreter shutdown is killed; inside C++ that aborts the process with
"terminate called without an active exception". Prints a count of the exit statuses; returns 1 unless all are 0.
"""

import collections
import os
import signal
import socket
import sys
import time

import torch
import torch.distributed as dist

from fastrlhf.train.runtime import Runtime, RuntimeConfig

WORLD = 2


def rank_of_a_run(rank, port):
    """The end of a stage, followed by a collective with a slow callback."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()})
    runtime = Runtime(RuntimeConfig(device="cpu"))
    assert runtime.sum(1.0) == [WORLD]
    runtime.accelerator.wait_for_everyone()
    # Rank 0 registers its callback before the collective completes, so a thread of the process group runs it.
    time.sleep(0.2 * rank)
    last = dist.all_reduce(torch.ones(1000), async_op=True)
    last.get_future().then(lambda _: [time.sleep(0.001) for _ in range(500)])
    # last.wait() would also wait for the callback.


def ended(status):
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return os.WEXITSTATUS(status)


def main() -> int:
    torch.set_num_threads(1)
    endings = collections.Counter()
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 50):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(WORLD):
            ranks.append(os.fork())  # fast: all modules are imported
            if ranks[-1] == 0:
                rank_of_a_run(rank, port)
                return 0  # exits through the interpreter's shutdown
        endings.update(ended(os.waitpid(pid, 0)[1]) for pid in ranks)
    print(dict(endings))
    return 0 if set(endings) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
