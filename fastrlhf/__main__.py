"""python -m fastrlhf, the same as the fastrlhf command."""

from fastrlhf.cli import program

program()
