"""One kind of progress bar for all long work: on a terminal a bar with rate and time left, elsewhere nothing."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar"]


def progress_bar() -> Progress:
    """A bar on standard error. Tasks may carry `note=`, a text such as the rate, shown behind the count."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not (console.is_terminal or "ipykernel" in sys.modules),
        transient=True,
    )
