"""Runs each fault of faults.cu that the command line names in a forked process, and prints the outcomes as JSON."""

import json
import os
import sys

import torch

torch.ops.load_library(os.environ["FASTRLHF_HOST_SHIM"])
N = 61
# These write as many elements as they read; the others one for each of their 64 threads.
SHORT = {"sound", "no barrier", "read past the end", "write past the end", "unwritten tensor"}


def attempt(kind):
    x = torch.empty(N) if kind == "unwritten tensor" else torch.arange(1.0, N + 1)
    os.environ["HOST_SHIM_SM"] = "80" if "sm_80" in kind else "90"
    out = torch.zeros(N if kind in SHORT else 64)
    torch.ops.host_shim.fault(x, out, "sound" if kind == "unwritten tensor" else kind)
    return out.tolist()


def in_a_fork(kind):
    """(what it returned, or None; the text of its error or of the sanitizer)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            text = json.dumps([attempt(kind), ""])
        except RuntimeError as error:
            text = json.dumps([None, str(error)])
        os.write(1, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if status == 0 else [None, text]


print(json.dumps({kind: in_a_fork(kind) for kind in sys.argv[1:]}))
