"""Training from the tutorials' loop to fastseg, one change per row: pairs per second, and the Dice that they reach.

    .venv-peers/bin/python benchmarks/training.py                            # 256 pairs, 64 channels, 150 steps per row
    .venv-peers/bin/python benchmarks/training.py --data DIR --channels 16 --no-compile --json training.json
    python benchmarks/training.py --time-to-dice 0.97 --limit-s 600          # seconds until validation reaches a Dice

Each row runs in processes of its own, in turn with the others. First its loss and gradients are compared with those of
the same weights in plain float32; a wrong row is not timed. README.md describes the method and the columns;
trainers.py builds the rows.
"""

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chart import OURS, PEER, Bar, draw_bars
from engines import search_workers
from files import carvana_pairs
from measure import AfterRun, in_fresh_process, median, run_in_turn, short, spread
from report import cores, describe_machine, make_parser, plus_minus, print_table, run, some_of, write_report
from time_to_dice import RACERS, race
from train_row import run_row
from trainers import COMPILED, NEED_GPU, PEERS, WATERFALL, Setting

import fastseg
from fastseg.config import Config
from fastseg.runtime.device import choose_device

PACKAGES = ("kornia", "albumentations", "segmentation-models-pytorch", "matplotlib")
ROWS = {**WATERFALL, **PEERS}
AIM_EFFICIENCY = 97.0  # percent
SAME_LOSS = 1e-4  # relative
STEP = "#d9a5ad"  # colour of the rows between `tutorial` and `fastseg`
LABEL_WIDTH = 44  # characters in the chart
MEDIANS = (
    *("first_pairs_per_s", "pairs_per_s", "step_ms", "data_wait_pct", "data_efficiency_pct", "peak_gib", "val_dice"),
    *("matmul_tflops", "gflop_a_pair", "exact_loss", "loss_error", "gradient_error"),
)


def make_setting(options: argparse.Namespace, pairs: fastseg.Pairs) -> Setting:
    train_pairs, val_pairs = fastseg.split_by_group(pairs, options.val_fraction, seed=0)
    steps_an_epoch = len(train_pairs) // options.batch_size
    if not steps_an_epoch:
        raise fastseg.ConfigError(
            f"--batch-size: must be at most {len(train_pairs)}, the training pairs; got {options.batch_size}. Lower it."
        )
    config = Config(
        base_channels=options.channels,
        batch_size=options.batch_size,
        num_epochs=max(2, math.ceil(options.steps / steps_an_epoch)),
        num_workers=options.workers,
        device=options.device,
        progressive_resizing=0.0,  # every row steps at full size; recipe.py measures smaller steps
    )
    reader = "tutorial" if importlib.util.find_spec("albumentations") else "pillow"
    return Setting(train_pairs, val_pairs, config, reader, {}, options.rounds)


def find_missing(names: list[str], no_compile: bool, device: torch.device) -> dict[str, str]:
    """The rows that cannot run here, with the reason."""
    missing = {}
    if no_compile:
        missing = {name: "--no-compile" for name in COMPILED if name in names}
    elif device.type != "cuda":
        missing = {name: "n/a: CUDA graphs need a GPU" for name in NEED_GPU if name in names}
    if "smp" in names and not importlib.util.find_spec("segmentation_models_pytorch"):
        missing["smp"] = "segmentation-models-pytorch is not installed: make peers"
    return missing


def best_workers(names: list[str], setting: Setting) -> dict[str, int]:
    """The number of workers that makes the peers' DataLoader fastest while nothing else computes."""
    wanted = [name for name in PEERS if name in names]
    if not wanted:
        return {}
    print("workers of the peers' DataLoader", file=sys.stderr)
    candidates = sorted({max(1, cores() // 2), cores()})
    some = setting.train_pairs.subset(range(min(256, len(setting.train_pairs))))
    return dict.fromkeys(wanted, in_fresh_process(search_workers, setting.reader, candidates, some))


def measure_all(
    names: list[str], setting: Setting, repeat: int, after_run: AfterRun = lambda runs, missing: None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The runs of each row, and the reason why a row is missing."""
    exact_losses: list[float] = []

    def run_once(name: str, folder: str) -> dict[str, Any]:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}"  # empty in the row's first run
        found = in_fresh_process(run_row, name, setting)
        exact_losses.append(found["exact_loss"])
        if name != "smp" and abs(found["exact_loss"] / exact_losses[0] - 1) > SAME_LOSS:
            raise ValueError(f"other weights or another batch than the first row: exact loss {found['exact_loss']}")
        print(f"{name}: {median(found['pairs_per_s']):.1f} pairs/s", file=sys.stderr)
        return found

    with tempfile.TemporaryDirectory() as folder:
        runs, missing = run_in_turn({name: partial(run_once, name, folder) for name in names}, repeat, after_run)
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    return runs, missing


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table: medians over all measurements of its runs."""

    def values(key: str) -> list[float]:
        return [value for run in runs for value in (run[key] if isinstance(run[key], list) else [run[key]])]

    shares = [median(run["pairs_per_s"]) * run["gflop_a_pair"] / 1e3 / run["matmul_tflops"] for run in runs]
    row = {"row": name, "note": ROWS[name]}
    row |= {key: runs[0][key] for key in ("dtype", "reader_workers", "steps", "parameters")}
    row |= {key: short(median(values(key))) if values(key) else None for key in MEDIANS}
    row |= {f"{key}_spread": short(spread(values(key))) for key in ("pairs_per_s", "val_dice")}
    row["limit_pct"] = short(100 * median(shares))
    compiling = [seconds for seconds in values("compile_s") if seconds is not None]
    row["compile_s"] = short(compiling[0]) if compiling else None
    row["compile_warm_s"] = short(median(compiling[1:])) if compiling[1:] else None
    return row


def print_rows(rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    def cell(row: dict[str, Any], key: str, digits: int) -> str:
        return "-" if row[key] is None else f"{row[key]:,.{digits}f}"

    header = ["row", "first epoch", "later epochs", "step ms", "data wait %", "data efficiency %", "peak GiB"]
    table = []
    for row in rows:
        digits = 0 if row["pairs_per_s"] >= 100 else 1
        cells = [row["row"], cell(row, "first_pairs_per_s", digits)]
        cells += [plus_minus(row["pairs_per_s"], row["pairs_per_s_spread"], digits)]
        cells += [cell(row, key, 1) for key in ("step_ms", "data_wait_pct", "data_efficiency_pct")]
        cells += [cell(row, "peak_gib", 2), cell(row, "compile_s", 1), cell(row, "val_dice", 4)]
        table.append([*cells, cell(row, "limit_pct", 1), row["note"]])
    print_table([*header, "compile s", "val Dice", "limit %", ""], table, missing)
    for row in rows:
        if row["row"] in ("fastseg", "smp"):
            size = f"{row['parameters'] / 1e6:.2f} M parameters, {row['gflop_a_pair']:.1f} GFLOP per pair and step"
            print(f"{row['row']}: {size}; {row['dtype']} matrix product {row['matmul_tflops']:.2f} TFLOP/s")


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest row of `fastseg.train` against its peers, and whether its data keep up."""
    rate = {row["row"]: row["pairs_per_s"] for row in rows}
    ours = max({"fastseg", "graphs", "compile"} & set(rate), key=lambda name: rate[name], default=None)
    if ours is None:
        return {}
    times = {name: short(rate[ours] / rate[name]) for name in ("tutorial", "plain") if name in rate}
    print(f"{ours}:", ", ".join(f"{value:.2f} x {name}" for name, value in times.items()) or "no peer was measured")
    efficiency = next(row["data_efficiency_pct"] for row in rows if row["row"] == ours)
    if efficiency is not None:
        verdict = "reached" if efficiency >= AIM_EFFICIENCY else "missed"
        print(f"data_efficiency_pct: {efficiency:.1f}, of the rate on a resident batch; {AIM_EFFICIENCY:.0f} {verdict}")
    return {"best": ours, "times_as_fast": times, "data_efficiency_pct": efficiency}


def draw(path: Path, rows: list[dict[str, Any]], setting: Setting) -> None:
    def bar(row: dict[str, Any]) -> Bar:
        color = PEER if row["row"] in ("tutorial", *PEERS) else OURS if "fastseg.train" in row["note"] else STEP
        rate = f"{row['pairs_per_s']:,.{0 if row['pairs_per_s'] >= 100 else 1}f}"
        text = f"{rate}   Dice {row['val_dice']:.3f}   {row['limit_pct']:.0f} % of the limit"
        label = row["note"] if row["note"].startswith("+") else f"{row['row']}: {row['note']}"
        return Bar(
            textwrap.fill(label, LABEL_WIDTH, break_on_hyphens=False),
            row["pairs_per_s"],
            row["pairs_per_s_spread"],
            color,
            text,
        )

    panels = {
        "Each row has everything above it": [bar(row) for row in rows if row["row"] in WATERFALL],
        "Other loops": [bar(row) for row in rows if row["row"] in PEERS],
    }
    size = f"{setting.config.base_channels} channels, batch {setting.config.batch_size}"
    title = f"Training a UNet of {size}, 160x240: {describe_machine()}"
    subtitle = (
        f"Later epochs over {len(setting.train_pairs)} Carvana-like pairs, files to weights; medians with half the "
        f"interquartile range;\nDice on {len(setting.val_pairs)} pairs of other cars after {rows[0]['steps']} steps; "
        "the limit is the rate of a large matrix product"
    )
    draw_bars(
        path, title, subtitle, "pairs per second", {name: bars for name, bars in panels.items() if bars}, in_order=True
    )


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, data=True, device=True)
    parser.add_argument("--pairs", type=int, default=256, help="training and validation together")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share of the cars")
    parser.add_argument("--channels", type=int, help="without it, 64 on a GPU and 16 on a CPU")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150, help="at least, in whole epochs")
    parser.add_argument("--rows", type=some_of(ROWS), default=",".join(ROWS))
    parser.add_argument("--repeat", type=int, default=3, help="processes per row")
    parser.add_argument("--rounds", type=int, default=3, help="comparisons of real data with a resident batch")
    parser.add_argument("--workers", type=int, default=cores(), help="decoding threads or processes")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows that compile")
    parser.add_argument("--time-to-dice", type=float, metavar="DICE", help="measure the seconds to this Dice instead")
    parser.add_argument("--racers", type=some_of(RACERS), default=",".join(RACERS), help="of --time-to-dice")
    parser.add_argument("--limit-s", type=float, default=600, help="of --time-to-dice")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    device = choose_device(options.device)
    options.channels = options.channels or (64 if device.type == "cuda" else 16)
    pairs, data = carvana_pairs(options.data, options.pairs)
    setting = make_setting(options, pairs)
    content: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "channels": options.channels,
        "batch_size": options.batch_size,
        "train_pairs": len(setting.train_pairs),
        "val_pairs": len(setting.val_pairs),
        "reader": setting.reader,
        "data": data,
        "repeat": options.repeat,
    }
    if options.time_to_dice is not None:
        result = race(options.racers, setting, options.time_to_dice, options.limit_s, options.repeat)
        write_report("time_to_dice", {**result, **content}, options.json, PACKAGES)
        return
    missing = find_missing(options.rows, options.no_compile, device)
    names = [name for name in options.rows if name not in missing]
    setting = setting._replace(reader_workers=best_workers(names, setting))

    def save(runs: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> None:
        rows = [summarise(name, done) for name, done in runs.items()]
        write_report("training", {"rows": rows, "missing": failed, **content}, options.json, PACKAGES, finished=False)

    runs, failed = measure_all(names, setting, options.repeat, save)
    missing |= failed
    rows = [summarise(name, done) for name, done in runs.items()]
    print_rows(rows, missing)
    content = {"rows": rows, **compare(rows), "missing": missing, **content, "rounds": options.rounds}
    if options.json and rows:
        draw(Path(options.json).with_suffix(".png"), rows, setting)
    write_report("training", content, options.json, PACKAGES)


if __name__ == "__main__":
    run(main)
