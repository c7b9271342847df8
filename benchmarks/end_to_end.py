"""Seconds from the start of `fastseg train` to its end, and to a Dice: the whole of Carvana in three epochs.

    python benchmarks/end_to_end.py                                          # 5,088 pairs, 64 channels, 3 epochs
    python benchmarks/end_to_end.py --pairs 256 --channels 8 --ways eager    # a small one, for a CPU

Carvana-like files, linked several times up to `--pairs`; a tenth of the cars is validation. Each way is the command in
a process of its own: `eager` does not compile, `host` and `dali` neither and have a fixed decoder, `graphs` captures
CUDA graphs (on a GPU only), `cold` compiles into an empty folder, `warm` finds the compiled code of `cold`, `auto` is
the default with that folder. Everything counts: Python, imports, checks of the files, decoding, compiling, validation,
checkpoints, pictures.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from command import folder_fields, last_line, train_command
from files import carvana_pairs, link_pairs
from measure import median, run_in_turn, spread
from report import cores, describe_machine, make_parser, plus_minus, print_table, run, some_of, write_report

import fastseg
from fastseg.errors import ConfigError
from fastseg.runtime.device import choose_device

# The name of a way, and its fields. A run of `warm` or `auto` needs one of `cold` before it.
WAYS = {
    "graphs": {"compile": "graphs"},
    "cold": {"compile": "on"},
    "warm": {"compile": "on"},
    "auto": {"compile": "auto"},
    "eager": {"compile": "off"},
    "host": {"compile": "off", "decoder": "host"},
    "dali": {"compile": "off", "decoder": "dali"},
}
VAL_SHARE = 0.1
TARGETS = (0.97, 0.99)
numbers = itertools.count()  # of the runs


def train(folder: Path, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command in FOLDER; returns its summary, and when each epoch's Dice was known.

    Raises:
        RuntimeError: the command failed; with the last line that it printed.
    """
    compiled, name = folder / "compiled", f"{way}-{next(numbers)}"
    if way == "cold":
        shutil.rmtree(compiled, ignore_errors=True)
    command = train_command(
        **folder_fields(folder),
        base_channels=options.channels,
        num_epochs=options.epochs,
        refiner_steps=0,
        batch_size=options.batch_size,
        num_workers=options.workers,
        device=options.device,
        **WAYS[way],
        out_dir=folder / "runs",
        name=name,
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.time() - started
    if done.returncode:
        raise RuntimeError(f"fastseg train failed: {last_line(done.stderr)}")
    run_dir = folder / "runs" / name
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    begun = seconds - summary["seconds"]  # Python and the imports, before fastseg.train
    return {
        "seconds": round(seconds, 2),
        "val_dice": round(summary["val_dice"], 5),
        "pairs_per_s": round(summary["pairs_per_s"], 1),
        "pairs_per_s_by_epoch": [round(line["pairs_per_s"], 1) for line in lines],
        "data_wait_pct": [round(line["data_wait_pct"], 2) for line in lines],
        **{f"seconds_to_{target}": seconds_to(target, lines, begun) for target in TARGETS},
        "seconds_by_part": {"python and imports": round(begun, 2), **summary["seconds_by_part"]},
        "device": summary["device"],
    }


def seconds_to(target: float, lines: list[dict[str, Any]], begun: float) -> float | None:
    """Seconds from the start of the process until an epoch's Dice reached the target; None if none did."""
    reached = [line["elapsed_seconds"] for line in lines if line["val_dice"] >= target]
    return round(begun + reached[0], 2) if reached else None


def summarise(way: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, and the median and spread of all."""
    seconds = [run["seconds"] for run in runs]
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    all_runs = {"seconds": round(median(seconds), 2), "seconds_spread": round(spread(seconds), 2), "runs": len(runs)}
    return {"way": way, **middle, **all_runs}


def print_rows(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    table = []
    for row in rows:
        waits = " / ".join(f"{wait:.1f}" for wait in row["data_wait_pct"])
        to = [f"{row[f'seconds_to_{target}'] or '-'}" for target in TARGETS]
        seconds = plus_minus(row["seconds"], row["seconds_spread"], 1)
        table.append([row["way"], seconds, *to, f"{row['val_dice']:.4f}", waits])
    header = ["way", "seconds", *(f"to Dice {target}" for target in TARGETS), "Dice", "data wait, % by epoch"]
    print_table(header, table, missing)
    for row in rows:
        parts = sorted(row["seconds_by_part"].items(), key=lambda part: -part[1])
        print(f"{row['way']}: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts))


def main() -> None:
    parser = make_parser(__doc__, data=True, device=True)
    parser.add_argument("--files", type=int, default=256, help="different pairs")
    parser.add_argument("--pairs", type=int, default=5088)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--ways", type=some_of(WAYS), help=f"some of {','.join(WAYS)}; without it, all that work here")
    parser.add_argument("--repeat", type=int, default=1, help="processes per way")
    options = parser.parse_args()
    on_gpu = choose_device(options.device).type == "cuda"
    ways = options.ways or [way for way in WAYS if on_gpu or way not in ("graphs", "dali")]
    if "graphs" in ways and not on_gpu:
        raise ConfigError("--ways: graphs needs a GPU. Use the others.")
    pairs, files = carvana_pairs(options.data, options.files)
    settings = {"pairs": options.pairs, "channels": options.channels, "epochs": options.epochs}

    def save(runs: dict[str, list[dict[str, Any]]], missing: dict[str, str], finished: bool = False) -> None:
        rows = [summarise(way, done) for way, done in runs.items()]
        content = {"rows": rows, "missing": missing, "settings": settings, "files": files}
        write_report("end_to_end", content, options.json, ("kornia",), finished=finished)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_pairs, val_pairs = fastseg.split_by_group(pairs, VAL_SHARE, seed=0)
        val_count = round(VAL_SHARE * options.pairs)
        link_pairs(train_pairs, folder, "train", options.pairs - val_count)
        link_pairs(val_pairs, folder, "val", val_count)
        print(f"fastseg train on {options.pairs - val_count} + {val_count} pairs", file=sys.stderr)
        jobs = {way: partial(train, folder, way, options) for way in ways}
        runs, missing = run_in_turn(jobs, options.repeat, save)
    print("\n{pairs} pairs, {channels} channels, {epochs} epochs, batch ".format(**settings), end="")
    print(f"{options.batch_size}; {describe_machine()}\n")
    print_rows([summarise(way, done) for way, done in runs.items()], missing)
    save(runs, missing, finished=True)


if __name__ == "__main__":
    run(main)
