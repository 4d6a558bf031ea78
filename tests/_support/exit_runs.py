"""Short runs of two ranks that end while a thread of their process group still has Python to run.

    python tests/_support/exit_runs.py [runs]

A thread that asks for Python's lock after the interpreter has begun to close is ended by force, and inside C++ that
is `terminate called without an active exception`. Prints how the ranks ended; 1 if any did not end well.
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
    """What a stage does at its end, and a last collective whose callback is slow."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()})
    runtime = Runtime(RuntimeConfig(device="cpu"))
    assert runtime.sum(1.0) == [WORLD]
    runtime.accelerator.wait_for_everyone()
    # Rank 0 leaves its callback before its work is done, and so to a thread of the group.
    time.sleep(0.2 * rank)
    last = dist.all_reduce(torch.ones(1000), async_op=True)
    last.get_future().then(lambda _: [time.sleep(0.001) for _ in range(500)])
    # Not last.wait(): it waits for the callback too.


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
            ranks.append(os.fork())  # quick: all imports are done
            if ranks[-1] == 0:
                rank_of_a_run(rank, port)
                return 0  # through the interpreter's own end
        endings.update(ended(os.waitpid(pid, 0)[1]) for pid in ranks)
    print(dict(endings))
    return 0 if set(endings) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
