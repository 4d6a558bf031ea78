"""Several runs of the command line in one process group: `stage_runs.py sft a.yaml ppo b.yaml ...` under torchrun."""

import sys

from accelerate.state import AcceleratorState

from fastrlhf.cli import main

if __name__ == "__main__":
    for stage, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        status = main([stage, "--config", path])
        if status:
            sys.exit(status)
        AcceleratorState._reset_state()  # runs of one process may differ in precision
