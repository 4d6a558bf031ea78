"""python -m fastrlhf, the same as the fastrlhf command."""

import sys

from fastrlhf.cli import main

sys.exit(main())
