"""Prints the report of `check`: findings, classes and totals."""

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fastseg.messages import count_of
from fastseg.quality.check import STYLES, CheckReport
from fastseg.quality.classes import RARE, ClassCount

__all__ = ["print_report"]

MAX_SHOWN = 2  # files that the printed table names for each finding


def print_report(report: CheckReport) -> None:
    """Print a table of the findings with the first files of each, and a line of totals."""
    folders = [folder for part in report.sets.values() for folder in (part.image_dir, part.mask_dir)]
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    common = "" if common == os.path.dirname(common) else os.path.join(common, "")  # the root is no prefix
    table = Table("", Column("files", justify="right"), Column("found", overflow="fold"), box=box.SIMPLE_HEAD)
    for finding in report.findings:
        lines = [f"{finding.what} ({finding.where})"]
        for file, note in finding.files[:MAX_SHOWN]:
            line = f"  {os.path.abspath(file)}{f': {note}' if note else ''}"
            lines.append(f"[dim]{escape(line.replace(common, '') if common else line)}[/]")
        style = STYLES[finding.severity]
        count = "" if finding.severity == "info" else str(len(finding.files))
        table.add_row(f"[{style}]{finding.severity}[/]", count, "\n".join(lines))
    if report.findings:
        Console().print(table)
    for name, counts in report.classes.items():
        _print_classes(name, counts)
    if report.proposal is not None:
        print(f"These classes fit the masks:\n{report.proposal.as_text()}\n{report.proposal.remedy}\n")
    pairs = ", ".join(f"{count_of(part.pairs, 'pair')} in {name}" for name, part in report.sets.items())
    rate = sum(part.pairs for part in report.sets.values()) / report.seconds
    print(
        f"{pairs}, decoded in {report.seconds:.1f} s ({rate:.0f} pairs/s): "
        f"errors: {report.count('error')}, warnings: {report.count('warning')}"
    )


def _print_classes(name: str, counts: Sequence[ClassCount]) -> None:
    """Print a table of the classes of a set, the most frequent first."""
    table = Table(f"class ({escape(name)})", Column("pixels", justify="right"), Column("images", justify="right"))
    table.box = box.SIMPLE_HEAD
    for item in sorted(counts, key=lambda item: -item.pixels):
        style = "yellow" if item.share < RARE else ""
        table.add_row(escape(item.name), f"{item.share:.2%}", str(item.images), style=style)
    Console().print(table)
