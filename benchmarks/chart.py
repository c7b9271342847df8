"""Bar charts of benchmark results."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

OURS, PEER, LIMIT = "#d1495b", "#8d99ae", "#2b2d42"  # colours


class Bar(NamedTuple):
    label: str
    value: float
    spread: float = 0.0
    color: str = PEER
    text: str = ""  # beside the bar, instead of its value


def draw_bars(
    path: Path, title: str, subtitle: str, xlabel: str, panels: dict[str, Sequence[Bar]], *, in_order: bool = False
) -> None:
    """Draw panels of horizontal bars with their values, longest bar first; each panel has its own scale from 0.

    Args:
        in_order: keep the order of the bars, and use one scale in all panels.
    """
    longest = max(bar.value + bar.spread for bars in panels.values() for bar in bars)
    sizes = [len(bars) for bars in panels.values()]
    height = 1.2 + sum(0.55 + 0.3 * size for size in sizes)
    figure = Figure(figsize=(9.5, height), layout="constrained")
    grid = figure.subplots(len(panels), height_ratios=[0.5 + size for size in sizes], squeeze=False)
    for axes, (name, bars) in zip(grid[:, 0], panels.items(), strict=True):
        bars = list(reversed(bars)) if in_order else sorted(bars, key=lambda bar: bar.value)
        drawn = axes.barh(
            [bar.label for bar in bars],
            [bar.value for bar in bars],
            xerr=[bar.spread for bar in bars],
            color=[bar.color for bar in bars],
            height=0.74,
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )
        axes.bar_label(drawn, labels=[bar.text or f"{bar.value:,.0f}" for bar in bars], padding=5, fontsize=9)
        room = 1.65 if any(bar.text for bar in bars) else 1.1
        axes.set_xlim(0, (longest if in_order else max(bar.value + bar.spread for bar in bars)) * room)
        axes.set_title(name, loc="left", fontsize=10)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(labelsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for text, bar in zip(axes.get_yticklabels(), bars, strict=True):
            text.set_fontweight("bold" if bar.color == OURS else "normal")
    grid[-1, 0].set_xlabel(xlabel)
    figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left", fontsize=11, linespacing=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
