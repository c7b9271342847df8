"""Masks against time: `time_budget` beside fixed numbers of epochs, and the end of each run against its budget.

    python benchmarks/time_budget.py --data data --budgets 60,120,300,600 --epochs 5,20,40,80
    taskset -c 0 python benchmarks/time_budget.py --data data --busy 1      beside another busy process
    python benchmarks/time_budget.py --data data --budgets "" --epochs 20   the defaults

Each run is the command `fastseg train`; its seconds are those of the process, Python and imports included. Then
`fastseg evaluate`, which is not timed, scores the masks at the photos' own size.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from command import evaluate_command, folder_fields, last_line, train_command
from report import integers, make_parser, print_table, run, write_report

BUSY = "while True: pass"


def measure(folder: Path, out: Path, **fields: Any) -> dict[str, Any]:
    """One run: its scores, and the seconds of the process and of `fastseg.train`.

    Raises:
        RuntimeError: a command failed; with the last line that it printed.
    """
    name = "-".join(f"{field}-{value}" for field, value in fields.items())
    command = train_command(**folder_fields(folder), out_dir=out, name=name, **fields)
    began = time.perf_counter()
    _run(command)
    seconds = time.perf_counter() - began
    summary = json.loads((out / name / "summary.json").read_text())
    _run(evaluate_command(out / name / "best.pt", folder, out / name / "scores"))
    scores = json.loads((out / name / "scores/summary.json").read_text())
    return {
        **fields,
        "val_dice": round(summary["val_dice"], 5),
        "full_dice": round(scores["full_dice"], 5),
        "full_boundary_iou": round(scores["full_boundary_iou"], 4),
        "refine": scores["refine"],
        "process_s": round(seconds, 2),
        "train_s": round(summary["seconds"], 2),
        "refiner_s": round(summary["seconds_by_part"].get("outline refiner", 0.0), 2),
        "epochs": summary["epochs"],
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:4])} failed: {last_line(done.stderr)}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the scores at full size against the minutes of the process; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    scores = (("full_dice", "Dice at full size"), ("full_boundary_iou", "boundary IoU at full size"))
    for axes, (score, title) in zip(figure.subplots(1, 2), scores, strict=True):
        for field, label in (("time_budget", "--time-budget"), ("num_epochs", "--num-epochs")):
            points = sorted((row["process_s"] / 60, row[score]) for row in rows if field in row)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel="minutes of the command", title=title, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", metavar="DIR", default="data", help="folder of `fastseg synth`")
    parser.add_argument("--budgets", metavar="N,N", type=integers, default=[60, 120, 300], help="seconds")
    parser.add_argument("--epochs", metavar="N,N", type=integers, default=[], help="numbers of epochs, for comparison")
    parser.add_argument("--base-channels", metavar="N", type=int, default=16)
    parser.add_argument("--busy", metavar="N", type=int, default=0, help="other busy processes on the same cores")
    parser.add_argument("--picture", metavar="FILE", help="draw Dice against time")
    options = parser.parse_args()
    settings = [{"time_budget": budget} for budget in options.budgets] + [{"num_epochs": n} for n in options.epochs]
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    try:
        with tempfile.TemporaryDirectory() as name:
            rows = [
                measure(Path(options.data), Path(name), base_channels=options.base_channels, **setting)
                for setting in settings
            ]
    finally:
        for other in others:
            other.kill()
            other.wait()
    table = []
    for row in rows:
        budget = row.get("time_budget")
        over = f"{100 * (row['train_s'] / budget - 1):+.1f} %" if budget else ""
        setting = f"{budget} s" if budget else f"{row['num_epochs']} epochs"
        times = [*(f"{row[name]:.1f}" for name in ("process_s", "train_s", "refiner_s")), over]
        scores = [f"{row['val_dice']:.4f}", f"{row['full_dice']:.4f}", f"{row['full_boundary_iou']:.3f}", row["refine"]]
        table.append([setting, *scores, str(row["epochs"]), *times])
    names = ["", "Dice", "full-size Dice", "boundary IoU", "refined by", "epochs"]
    print_table([*names, "command, s", "train, s", "refiner, s", "over"], table)
    if options.picture:
        draw(rows, Path(options.picture))
    write_report("time_budget", {"busy": options.busy, "rows": rows}, options.json)


if __name__ == "__main__":
    run(main)
