"""Run several stages in one process group, under torchrun: `stage_runs.py sft a.yaml ppo b.yaml ...`."""

import sys

from accelerate.state import AcceleratorState

from fastrlhf.cli import end, main


def stages(lines) -> int:
    """Run each (stage, config file) in turn; return the exit status of the first that fails, or 0."""
    for stage, path in lines:
        status = main([stage, "--config", path])
        if status:
            return status
        AcceleratorState._reset_state()  # accelerate fixes the precision of a process, but stages may differ in theirs
    return 0


if __name__ == "__main__":
    end(stages(zip(sys.argv[1::2], sys.argv[2::2], strict=True)))
