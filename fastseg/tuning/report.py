"""What a study has found, for people and programs: best.json, trials.csv and two pictures."""

import csv
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from fastseg.config import Config, format_value
from fastseg.runtime.files import atomic_write
from fastseg.tuning.search_space import Range, Values
from fastseg.tuning.study import MAX_DEATHS, Study, given_back

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = [
    "best_trial",
    "draw_study",
    "print_study",
    "short_text",
    "trial_rows",
    "write_best",
    "write_trials",
]

STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
COLOURS = {"COMPLETE": "#1f5fa8", "PRUNED": "#e08a1e", "FAIL": "#b3261e"}
BEST = 5  # trials in the printed table


def best_trial(study: Study) -> "FrozenTrial | None":
    """The complete trial with the highest Dice, the first of equals."""
    complete = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda trial: trial.value or 0.0, default=None)


def trial_rows(study: Study, space: dict[str, Values]) -> list[dict[str, Any]]:
    """A row a trial: `trial`, `state`, `val_dice` (of its best epoch), `val_iou`, `best_epoch`, `epochs`, `seconds`,
    a column for each field searched, and `error`; None where there is nothing to say."""
    trials = study.trials()
    again = given_back(trials)
    rows = []
    for trial in trials:
        attrs, dice = trial.user_attrs, trial.intermediate_values.values()
        error = attrs.get("error")
        if trial.state.name == "FAIL" and trial.number not in again and error is None:
            error = f"its process died, the last of {MAX_DEATHS} times"
        rows.append(
            {
                "trial": trial.number,
                "state": "tried again" if trial.number in again else STATES[trial.state.name],
                "val_dice": max(dice, default=None),
                **{name: attrs.get(name) for name in ("val_iou", "best_epoch")},
                "epochs": len(dice),
                "seconds": round(attrs["seconds"], 1) if "seconds" in attrs else None,
                **{field: trial.params.get(field) for field in space},
                "error": error,
            }
        )
    return rows


def write_trials(study: Study, space: dict[str, Values]) -> None:
    """`trials.csv`: the rows of `trial_rows`."""
    rows = trial_rows(study, space)

    path = study.folder / "trials.csv"
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def write_best(study: Study, config: Config) -> Config | None:
    """`best.json`: `config` with the values of the best trial, to be trained as the run `best` in the study's folder.

    Returns:
        What was written; None where no trial has a score.
    """
    best = best_trial(study)
    if best is None:
        return None
    config = config.replace(**best.params, out_dir=study.folder, name="best")
    with atomic_write(study.folder / "best.json") as temporary:
        config.to_json(temporary)
    return config


def short_text(value: Any) -> str:
    """A value as it is read with ease; whoever needs all its digits finds them in the files."""
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def print_study(rows: list[dict[str, Any]], fields: Iterable[str]) -> None:
    """The best five trials on standard output, as a table."""
    fields = list(fields)
    table = Table(title="best trials", box=box.SIMPLE_HEAD)
    for name in ("trial", "Dice", *fields, "epochs"):
        table.add_column(name, justify="right")
    complete = [row for row in rows if row["state"] == STATES["COMPLETE"]]
    for row in sorted(complete, key=lambda row: -row["val_dice"])[:BEST]:
        values = [short_text(row[field]) for field in fields]
        table.add_row(str(row["trial"]), f"{row['val_dice']:.4f}", *values, str(row["epochs"]))
    Console().print(table)


def draw_study(study: Study, space: dict[str, Values]) -> None:
    """`history.png`: Dice by trial; `parallel.png`: Dice by values. One complete trial at least."""
    trials = study.ended()
    for name, figure in (("history.png", _draw_history(trials)), ("parallel.png", _draw_parallel(trials, space))):
        with atomic_write(study.folder / name) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _draw_history(trials: "list[FrozenTrial]") -> Figure:
    """A dot a trial, by how it ended, and the best so far."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    scored = {state: [(t.number, t.value) for t in trials if t.state.name == state] for state in ("COMPLETE", "PRUNED")}
    for (state, points), marker in zip(scored.items(), "ov", strict=True):
        if points:
            axes.plot(*np.array(points, float).T, marker, color=COLOURS[state], label=STATES[state], clip_on=False)
    complete = np.array(scored["COMPLETE"], float)
    best = np.maximum.accumulate(complete[:, 1])
    last = max(trial.number for trial in trials)
    reached = ([*complete[:, 0], last], [*best, best[-1]])
    axes.step(*reached, where="post", color=COLOURS["COMPLETE"], alpha=0.4, label="best so far")
    failed = [trial.number for trial in trials if trial.state.name == "FAIL"]
    if failed:
        foot = axes.get_xaxis_transform()  # they have no Dice: they stand at the foot of the picture
        axes.plot(failed, [0.02] * len(failed), "x", color=COLOURS["FAIL"], label="failed", transform=foot)
    axes.set(title=f"{len(trials)} trials, best Dice {best[-1]:.4f}", xlabel="trial", ylabel="validation Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_parallel(trials: "list[FrozenTrial]", space: dict[str, Values]) -> Figure:
    """A line a trial through its values and its Dice; the better, the darker and the further in front."""
    shown = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value or 0.0)
    scores = np.array([trial.value for trial in shown])
    # Trials that ended early or were hopeless shall not make all others look alike: they stand at the foot of the axis.
    low = np.quantile([trial.value for trial in shown if trial.state.name == "COMPLETE"], 0.1)
    high = scores.max() if scores.max() > low else low + 1e-6
    shares, shades = Normalize(low, high, clip=True)(scores), colormaps["Blues"]

    figure = Figure(figsize=(2.2 * (len(space) + 1) + 1, 4.5), layout="constrained")
    axes = figure.subplots()
    places = [_heights([trial.params[field] for trial in shown], values) for field, values in space.items()]
    places.append(shares)
    for line, share, trial in zip(np.array(places).T, shares, shown, strict=True):
        style = "-" if trial.state.name == "COMPLETE" else ":"
        axes.plot(line, style, color=shades(0.25 + 0.75 * share), linewidth=1 + share, solid_capstyle="round")
    for x, values in enumerate(space.values()):
        axes.axvline(x, color="black", linewidth=0.8)
        ticks = _ticks(values)
        for tick, y in zip(ticks, _heights(ticks, values), strict=True):
            _label(axes, x, float(y), format_value(tick))
    axes.axvline(len(space), color="black", linewidth=0.8)
    for y in (0.0, 0.25, 0.5, 0.75, 1.0):
        below = "≤ " if y == 0 and scores.min() < low else ""
        _label(axes, len(space), y, f"{below}{low + y * (high - low):.4f}")
    axes.set_xticks(range(len(space) + 1), [*space, "Dice"])
    axes.set(yticks=[], xlim=(-0.15, len(space) + 0.45), ylim=(-0.04, 1.04))
    axes.set_title("Values of every trial; darker is better, dotted ended early", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _heights(drawn: Sequence[Any], values: Values) -> NDArray[np.float64]:
    """Where drawn values stand on their axis, from 0 to 1."""
    if not isinstance(values, Range):
        return np.array([values.index(value) / (len(values) - 1) for value in drawn])
    scale = np.log if values.log else np.asarray
    low, high, at = scale(values.low), scale(values.high), scale(np.array(drawn, dtype=float))
    return np.asarray((at - low) / (high - low))


def _ticks(values: Values) -> Sequence[Any]:
    """Values to write on an axis: all choices, or five numbers of a range (fewer whole ones)."""
    if not isinstance(values, Range):
        return values
    space = np.geomspace if values.log else np.linspace
    ticks = space(values.low, values.high, 5)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return [int(tick) for tick in np.unique(ticks.round())]
    return [float(f"{tick:.2g}" if values.log else f"{tick:.3g}") for tick in ticks]


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    frame = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(x + 0.04, y, text, va="center", fontsize=8, bbox=frame, zorder=10)
