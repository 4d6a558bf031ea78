"""The report of a demo run, as written by `fastrlhf report`."""

from fastrlhf.report.content import CONTENT, check, load
from fastrlhf.report.run import ReportConfig, main, print_tables, write, write_page

__all__ = [
    "CONTENT",
    "ReportConfig",
    "check",
    "load",
    "main",
    "print_tables",
    "write",
    "write_page",
]
