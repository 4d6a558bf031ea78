"""What a stage prints: a progress bar, a line of metrics at intervals, and tables of samples."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fastrlhf.errors import counted, printable


class Terminal:
    """Terminal output of the main process; on other ranks nothing is printed.

    Args:
        stage: name at the start of each line.
        every: steps between two lines of metrics; 0 prints none.
        headline: metrics of a line, in this order; empty prints all.
        is_main: whether this is the main process.
    """

    def __init__(self, stage: str, every: int, headline: tuple[str, ...], is_main: bool):
        self.stage, self.every, self.headline, self.is_main = stage, every, headline, is_main
        self.total = 0
        self._started = False
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not is_main,
            transient=True,
        )

    def start(self, first: int, total: int, device: str) -> None:
        """Print the heading and start the progress bar at step `first` of `total`."""
        self.total = total
        if self.is_main:
            steps = f"from step {first} of {total}" if first else counted(total, "step")
            self._console.print(
                Text.assemble((self.stage, "bold"), f": {steps}, {device}"), soft_wrap=True
            )
        self._task = self._progress.add_task(self.stage, total=total, completed=first)
        self._progress.start()
        self._started = True

    def prints(self, step: int) -> bool:
        """Whether step `step` gets a line of metrics."""
        return self.is_main and self.every > 0 and (step % self.every == 0 or step == self.total)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Advance the progress bar to `step` and print its metrics if it is due."""
        self._progress.update(self._task, completed=step)
        if self.prints(step):
            names = [n for n in self.headline or metrics if n in metrics]
            numbers = "  ".join(f"{n} {metrics[n]:.4g}" for n in names)
            self._print(f"{self.stage} {step:>5}/{self.total}  {numbers}")

    def table(self, step: int, columns: tuple[str, ...], rows: list[tuple]) -> None:
        """Print a small table, e.g. of prompts and responses."""
        table = Table(*columns, title=f"{self.stage} {step}", title_justify="left", box=None)
        for row in rows:
            cells = (f"{x:.3g}" if isinstance(x, float) else printable(x) for x in row)
            table.add_row(*map(Text, cells))  # Text: never markup
        self._progress.console.print(table)

    def line(self, text: str) -> None:
        """Print a line of plain text."""
        if self.is_main:
            self._print(f"{self.stage}: {text}")

    def stop(self) -> None:
        """Remove the progress bar, if it was started."""
        if self._started:
            self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)
