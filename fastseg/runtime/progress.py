"""The progress bar of all long work: shown on a terminal or in a notebook, with rate and time left."""

import importlib.util

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["progress_bar"]

_SCREEN = Console(stderr=True)  # shared by all bars, so that nested bars appear below each other


class _Note(ProgressColumn):
    """The task's `note` field; pairs per second if it has none."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note") or f"{task.speed or 0:.3g} pairs/s")


def progress_bar(*, shown: bool = True) -> Progress:
    """A bar on standard error, if that is a terminal or a notebook and `shown` is true."""
    # In a notebook rich draws with ipywidgets; without them it warns at each of ten refreshes per second.
    in_notebook = _SCREEN.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    shown = shown and (_SCREEN.is_terminal or in_notebook)
    console = _SCREEN if shown else Console(quiet=True)  # otherwise a hidden bar prints a newline
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Note(),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=console, disable=not shown, transient=True)
