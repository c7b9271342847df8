"""The results of a study as files: best.json, trials.csv, history.png and parallel.png."""

import csv
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial
from rich import box
from rich.console import Console
from rich.table import Column, Table

from fastseg.config import Config, format_value
from fastseg.runtime.files import atomic_write
from fastseg.tuning.search_space import Distribution
from fastseg.tuning.study import MAX_DEATHS, Study, requeued_numbers

__all__ = ["best_trial", "draw_study", "print_study", "short_text", "trial_rows", "write_best", "write_trials"]

STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
STYLES = {"COMPLETE": ("o", "#1f5fa8"), "PRUNED": ("v", "#e08a1e"), "FAIL": ("x", "#b3261e")}  # marker, colour
NUM_PRINTED = 5  # trials in the printed table


def best_trial(study: Study) -> FrozenTrial | None:
    """The complete trial with the highest Dice, the first one if several are equal; None if no trial is complete."""
    complete = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda trial: trial.values[0], default=None)


def trial_rows(study: Study) -> list[dict[str, Any]]:
    """One row per trial; a missing value is None.

    `trial`, `state`, `val_dice` and `val_iou` (of the best epoch), `best_epoch`, `epochs`, `seconds`, one column per
    searched field, and `error`.
    """
    trials = study.trials()
    requeued = requeued_numbers(trials)
    rows = []
    for trial in trials:
        attrs, dice = trial.user_attrs, trial.intermediate_values.values()
        error = attrs.get("error")
        if trial.state.name == "FAIL" and trial.number not in requeued and error is None:
            error = f"its process died {MAX_DEATHS} times"
        rows.append(
            {
                "trial": trial.number,
                "state": "tried again" if trial.number in requeued else STATES[trial.state.name],
                "val_dice": trial.values[0] if trial.state.name == "COMPLETE" else max(dice, default=None),
                **{name: attrs.get(name) for name in ("val_iou", "best_epoch")},
                "epochs": len(dice),
                "seconds": round(attrs["seconds"], 1) if "seconds" in attrs else None,
                **{field: trial.params.get(field) for field in study.space},
                "error": error,
            }
        )
    return rows


def write_trials(study: Study) -> None:
    """Write `trials.csv`, the rows of `trial_rows`."""
    rows, path = trial_rows(study), study.folder / "trials.csv"
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def write_best(study: Study) -> Config | None:
    """Write `best.json`, a configuration that trains with the best values as the run `best` in the study's folder.

    Returns:
        That configuration; None if no trial is complete.
    """
    best = best_trial(study)
    if best is None:
        return None
    config = study.config.replace(**best.params, out_dir=study.folder, name="best")
    with atomic_write(study.folder / "best.json") as temporary:
        config.to_json(temporary)
    return config


def short_text(value: Any) -> str:
    """A value for display; the files hold all digits."""
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def print_study(rows: list[dict[str, Any]], fields: Collection[str]) -> None:
    """Print a table of the best trials."""
    columns = [Column(name, justify="right") for name in ("trial", "Dice", *fields, "epochs")]
    table = Table(*columns, title="best trials", box=box.SIMPLE_HEAD)
    complete = [row for row in rows if row["state"] == STATES["COMPLETE"]]
    for row in sorted(complete, key=lambda row: -row["val_dice"])[:NUM_PRINTED]:
        values = [short_text(row[field]) for field in fields]
        table.add_row(str(row["trial"]), f"{row['val_dice']:.4f}", *values, str(row["epochs"]))
    Console().print(table)


def draw_study(study: Study) -> None:
    """Draw `history.png` (Dice of each trial) and `parallel.png` (values and Dice); needs a complete trial.

    Optuna's own plots omit the trials that ended early or failed, which show what to avoid.
    """
    trials = study.ended()
    for name, figure in (("history.png", _draw_history(trials)), ("parallel.png", _draw_parallel(trials, study.space))):
        with atomic_write(study.folder / name) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _draw_history(trials: list[FrozenTrial]) -> Figure:
    """One marker per trial, by state, and the best Dice so far."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for state, (marker, colour) in STYLES.items():
        if shown := [trial for trial in trials if trial.state.name == state]:
            # A failed trial has no Dice; its marker is at the bottom of the picture.
            heights = [0.02 if state == "FAIL" else trial.values[0] for trial in shown]
            transform = axes.get_xaxis_transform() if state == "FAIL" else axes.transData
            numbers = [trial.number for trial in shown]
            axes.plot(numbers, heights, marker, color=colour, label=STATES[state], transform=transform, clip_on=False)
    scores = [trial.values[0] if trial.state.name == "COMPLETE" else np.nan for trial in trials]
    best = np.fmax.accumulate(scores)
    numbers, colour = [trial.number for trial in trials], STYLES["COMPLETE"][1]
    axes.step(numbers, best, where="post", color=colour, alpha=0.4, label="best so far")
    axes.set(title=f"{len(trials)} trials, best Dice {best[-1]:.4f}", xlabel="trial", ylabel="validation Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_parallel(trials: list[FrozenTrial], space: dict[str, Distribution]) -> Figure:
    """One line per trial through its values and its Dice; better trials are darker and in front."""
    shown = sorted((trial for trial in trials if trial.state.name != "FAIL"), key=lambda trial: trial.values[0])
    scores = np.array([trial.values[0] for trial in shown])
    # The Dice axis starts at the worst tenth of the complete trials: one hopeless trial must not hide all differences.
    low = np.quantile([trial.values[0] for trial in shown if trial.state.name == "COMPLETE"], 0.1)
    low = min(low, scores.max() - 1e-6)
    shades = Normalize(low, scores.max(), clip=True)(scores)
    dice_ticks = np.linspace(low, scores.max(), 5)
    dice_labels = [f"{'≤ ' if tick == low > scores.min() else ''}{tick:.4f}" for tick in dice_ticks]

    figure = Figure(figsize=(2.2 * len(space) + 3.2, 4.5), layout="constrained")
    host = figure.subplots()
    heights = []  # of all lines, from 0 to 1, one array per axis
    columns = [([d.to_internal_repr(t.params[field]) for t in shown], *_scale(d)) for field, d in space.items()]
    columns.append((scores.tolist(), "linear", dice_ticks.tolist(), dice_labels))
    for x, (values, scale, ticks, labels) in enumerate(columns):
        axis = host.twinx()
        axis.spines[:].set_visible(False)
        axis.spines["right"].set(visible=True, position=("data", x))
        axis.set(ylim=(ticks[0], ticks[-1]), yscale=scale)
        axis.set_yticks(ticks, labels, fontsize=8, bbox={"facecolor": "white", "linewidth": 0, "alpha": 0.8, "pad": 1})
        axis.minorticks_off()
        points = np.array([(0, value) for value in values])
        heights.append((axis.transScale + axis.transLimits).transform(points)[:, 1].clip(0, 1))
    for line, shade, trial in zip(np.transpose(heights), shades, shown, strict=True):
        style = "-" if trial.state.name == "COMPLETE" else ":"
        colour = colormaps["Blues"](0.25 + 0.75 * shade)
        host.plot(line, style, color=colour, linewidth=1 + shade, solid_capstyle="round", clip_on=False)
    host.set(xlim=(0, len(space)), ylim=(0, 1), yticks=[])
    host.set_xticks(range(len(space) + 1), [*space, "Dice"])
    host.set_title("Values of all trials; darker is better, dotted ended early", fontsize=10, pad=12)
    host.spines[:].set_visible(False)
    host.tick_params(length=0, pad=10)
    return figure


def _scale(distribution: Distribution) -> tuple[str, Sequence[float], list[str]]:
    """The scale of an axis, its ticks from bottom to top, and their labels."""
    if isinstance(distribution, CategoricalDistribution):
        return "linear", range(len(distribution.choices)), [format_value(choice) for choice in distribution.choices]
    spread = np.geomspace if distribution.log else np.linspace
    ticks = spread(distribution.low, distribution.high, 5).tolist()
    if isinstance(distribution, IntDistribution):
        ticks = sorted({round(tick) for tick in ticks})
    return "log" if distribution.log else "linear", ticks, [short_text(tick) for tick in ticks]
