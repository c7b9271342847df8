"""Masks of six classes: seconds and mean IoU of fastseg, smp in fastseg's loop and in its own, and Ultralytics.

    make peers
    .venv-peers/bin/python benchmarks/peers_training.py --repeats 3
    .venv-peers/bin/python benchmarks/peers_training.py --rows smp --repeats 1 --json smp.json
    .venv-peers/bin/python benchmarks/peers_training.py --rows "" --merge smp.json,fastseg.json    the table of both

The pairs are those of `fastseg synth --cars 16 --parts`: 192 of 12 cars to train on, 64 of 4 other cars to score on.
Each run is a process of its own with the defaults of its program (peer_programs.py); only the size and the epochs are
given. Every program writes masks at the photos' size, which one scorer reads (score_masks.py).
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from files import fill_page_cache, parts_folder
from measure import in_fresh_process, median, run_in_turn, spread
from peer_programs import PROGRAMS, Job
from report import describe_machine, make_parser, plus_minus, print_table, run, write_report
from score_masks import mean_iou, score_folders

import fastseg

EPOCHS = {"smp": 5, "ultralytics": 24}  # so that a run takes less than ten minutes on one core
TOLERANCE = 0.005  # of the best mean IoU: where a program has stopped gaining
PACKAGES = ("segmentation-models-pytorch", "ultralytics", "torchvision", "albumentations", "opencv-python")


def train_once(name: str, data: Path, epochs: int) -> dict[str, Any]:
    """Train and predict in a fresh process, then score.

    Raises:
        ValueError: masks are missing or have another size.
    """
    num_classes = len(fastseg.Config(classes=data / "classes.json").classes)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        job = Job(data, work, num_classes, epochs, time.monotonic())
        done = in_fresh_process(PROGRAMS[name][1], job)
        found = score_folders(data / "val_masks", work / "predicted", num_classes)
    return {
        "seconds": round(done["seconds"], 1),
        "cpu_seconds": round(done["cpu_seconds"], 1),
        **stop_of_gain(done["elapsed"], done["scores"]),
        "epochs": len(done["scores"]),
        "mean_iou": round(mean_iou(found["cells"]), 4),
        "full_mean_iou": round(mean_iou(found["full"]), 4),
        "class_iou": [None if iou is None else round(iou, 4) for iou in found["cells"]],
        "own_scores": [round(score, 4) for score in done["scores"]],
        "elapsed": [round(seconds, 1) for seconds in done["elapsed"]],
    }


def stop_of_gain(elapsed: list[float], scores: list[float]) -> dict[str, Any]:
    """When a program's own score first is within TOLERANCE of its best, and whether that is before the last epoch."""
    stop = next(epoch for epoch, score in enumerate(scores) if score >= max(scores) - TOLERANCE)
    return {"gain_seconds": round(elapsed[stop], 1), "gain_epoch": stop + 1, "still_gained": stop == len(scores) - 1}


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spreads over the runs of a row."""
    fields = ("seconds", "cpu_seconds", "gain_seconds", "mean_iou", "full_mean_iou")
    row: dict[str, Any] = {"row": name, "program": PROGRAMS[name][0]}
    for field in fields:
        values = [run[field] for run in runs if field in run]  # the first reports have no CPU seconds
        if not values:
            continue
        row |= {field: round(median(values), 4), f"{field}_spread": round(spread(values), 4)}
    return {**row, "epochs": runs[0]["epochs"], "still_gained": any(run["still_gained"] for run in runs), "runs": runs}


def print_rows(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    table = []
    for row in rows:
        seconds = plus_minus(row["gain_seconds"], row["gain_seconds_spread"])
        table.append(
            [
                row["program"],
                plus_minus(row["seconds"], row["seconds_spread"]),
                plus_minus(row["cpu_seconds"], row["cpu_seconds_spread"]) if "cpu_seconds" in row else "-",
                str(row["epochs"]),
                "still improving" if row["still_gained"] else seconds,
                plus_minus(row["mean_iou"], row["mean_iou_spread"], 3),
                plus_minus(row["full_mean_iou"], row["full_mean_iou_spread"], 3),
                str(len(row["runs"])),
            ]
        )
    columns = ["seconds", "CPU s", "epochs", "last improvement, s", "mean IoU at 160x240", "at full size", "runs"]
    print_table(["program", *columns], table, missing)


def read_runs(paths: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The runs of earlier reports, by row, each with its commit and the share of the CPU time of other processes."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        report = json.loads(Path(path).read_text())
        origin = {"commit": report["commit"], "others_cpu_share": report["machine"]["others_cpu_share"]}
        for row in report["rows"]:
            runs.setdefault(row["row"], []).extend({**origin, **run} for run in row["runs"])
    return runs


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", metavar="DIR", help="folder of `fastseg synth --parts`; without it, one is generated")
    parser.add_argument("--rows", default=",".join(PROGRAMS), help="some of them, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row")
    parser.add_argument("--epochs", type=int, help=f"of the peers' own loops; without it {EPOCHS}")
    parser.add_argument("--merge", metavar="FILES", default="", help="reports whose runs are added")
    options = parser.parse_args()
    names = [name for name in options.rows.split(",") if name]
    if unknown := set(names) - set(PROGRAMS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} unknown. Use some of {', '.join(PROGRAMS)}.")
    data = Path(options.data) if options.data else parts_folder()
    for split in ("train", "val"):
        fill_page_cache(fastseg.find_pairs(data / f"{split}_images", data / f"{split}_masks"))
    earlier = read_runs([path for path in options.merge.split(",") if path])

    def save(runs: dict[str, list[dict[str, Any]]], missing: dict[str, str], finished: bool = False) -> None:
        found = {name: earlier.get(name, []) + runs.get(name, []) for name in PROGRAMS}
        rows = [summarise(name, done) for name, done in found.items() if done]
        if finished:
            print(f"\n192 + 64 pairs, six classes; {describe_machine()}\n")
            print_rows(rows, missing)
        write_report("peers_training", {"rows": rows, "missing": missing}, options.json, PACKAGES, finished=finished)

    jobs = {name: partial(train_once, name, data, options.epochs or EPOCHS.get(name, 0)) for name in names}
    runs, missing = run_in_turn(jobs, options.repeats, save)
    save(runs, missing, finished=True)


if __name__ == "__main__":
    run(main)
