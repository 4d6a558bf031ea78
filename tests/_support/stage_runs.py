"""Several runs of the command line in one process group: `stage_runs.py sft a.yaml ppo b.yaml ...` under torchrun."""

import sys

from accelerate.state import AcceleratorState

from fastrlhf.cli import main


def stages(lines) -> int:
    """Run (stage, file of its config) one after the other; the status of the first that fails, or 0."""
    for stage, path in lines:
        status = main([stage, "--config", path])
        if status:
            return status
        AcceleratorState._reset_state()  # runs of one process may differ in precision
    return 0


if __name__ == "__main__":
    sys.exit(stages(zip(sys.argv[1::2], sys.argv[2::2], strict=True)))
