"""Training from the tutorials' loop to fastseg, one change a row: pairs per second, and the Dice they reach.

    python benchmarks/training.py                                            # 256 pairs, 64 channels, 150 steps a row
    python benchmarks/training.py --data DIR --channels 16 --no-compile --json benchmarks/results/training.json
    python benchmarks/training.py --time-to-dice 0.97 --limit-s 600          # seconds until validation gets there

Each row runs in a process of its own, several times, in turn with the others. First its loss and gradients are
compared with those of the same weights in plain float32; one that is wrong is not timed. README.md says how we
measure and what the columns mean; trainers.py says which parts of fastseg a row is made of.
"""

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import textwrap
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from chart import OURS, PEER, Bar, draw_bars
from engines import search_workers
from loader import in_fresh_process
from measure import carvana_pairs, cores, describe, machine, median, one_line, print_table, report, short, spread
from time_to_dice import RACERS, race
from train_row import run_row
from trainers import COMPILED, NEED_GPU, PEERS, WATERFALL, Setting

import fastseg
from fastseg.config import Config
from fastseg.runtime.device import choose_runtime

PACKAGES = ("kornia", "albumentations", "segmentation-models-pytorch", "matplotlib")
FAILURES = (ImportError, OSError, RuntimeError, ValueError, BrokenProcessPool, fastseg.FastsegError)
AIM_EFFICIENCY = 97.0  # per cent
SAME_LOSS = 1e-4  # relative
STEP = "#d9a5ad"  # colour of the rows between the tutorial's and ours
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
            f"--batch-size: must be at most {len(train_pairs)}, the training pairs; got {options.batch_size}."
        )
    config = Config(
        base_channels=options.channels,
        batch_size=options.batch_size,
        num_epochs=max(2, math.ceil(options.steps / steps_an_epoch)),
        num_workers=options.workers,
        device=options.device,
        progressive_resizing=0.0,  # every row steps at full size; what small steps win is a matter of recipe.py
    )
    reader = "tutorial" if importlib.util.find_spec("albumentations") else "pillow"
    return Setting(train_pairs, val_pairs, config, reader, {}, options.rounds)


def find_missing(names: list[str], no_compile: bool, device: torch.device) -> dict[str, str]:
    """Rows that cannot run here, with the reason."""
    missing = {}
    if no_compile:
        missing = {name: "--no-compile" for name in COMPILED if name in names}
    elif device.type != "cuda":
        missing = {name: "n/a: CUDA graphs need a GPU" for name in NEED_GPU if name in names}
    if "smp" in names and not importlib.util.find_spec("segmentation_models_pytorch"):
        missing["smp"] = "segmentation-models-pytorch is not installed: pip install '.[peers]'"
    return missing


def best_workers(names: list[str], setting: Setting) -> dict[str, int]:
    """Of the peers' DataLoader, as it delivers most pairs per second while nothing else computes."""
    wanted = [name for name in PEERS if name in names]
    if not wanted:
        return {}
    print("workers of the peers' DataLoader", file=sys.stderr)
    candidates = sorted({max(1, cores() // 2), cores()})
    some = setting.train_pairs.subset(range(min(256, len(setting.train_pairs))))
    return dict.fromkeys(wanted, in_fresh_process(search_workers, setting.reader, candidates, some))


def measure_all(
    names: list[str], setting: Setting, repeat: int, missing: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each row; what fails is added to `missing`."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names if name not in missing}
    exact_loss = None  # of the first row: the others begin with the same weights and the same batch
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeat):
            for name in list(runs):
                print(f"{name}: run {turn + 1} of {repeat}", file=sys.stderr)
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}"  # the first run compiles anew
                try:
                    run = in_fresh_process(run_row, name, setting)
                    exact_loss = exact_loss or run["exact_loss"]
                    if name != "smp" and abs(run["exact_loss"] / exact_loss - 1) > SAME_LOSS:
                        raise ValueError(f"other weights or another batch: exact loss {run['exact_loss']}")
                    runs[name].append(run)
                    print(f"{name}: {median(run['pairs_per_s']):.1f} pairs/s", file=sys.stderr)
                except FAILURES as error:
                    missing[name] = one_line(error)
                    del runs[name]
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    return runs


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table: medians over everything that its runs measured."""

    def values(key: str) -> list[float]:
        return [value for run in runs for value in (run[key] if isinstance(run[key], list) else [run[key]])]

    shares = [median(run["pairs_per_s"]) * run["gflop_a_pair"] / 1e3 / run["matmul_tflops"] for run in runs]
    row = {"row": name, "note": {**WATERFALL, **PEERS}[name]}
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
        cells += [f"{cell(row, 'pairs_per_s', digits)} ± {cell(row, 'pairs_per_s_spread', digits)}"]
        cells += [cell(row, key, 1) for key in ("step_ms", "data_wait_pct", "data_efficiency_pct")]
        cells += [cell(row, "peak_gib", 2), cell(row, "compile_s", 1), cell(row, "val_dice", 4)]
        table.append([*cells, cell(row, "limit_pct", 1), row["note"]])
    print_table([*header, "compile s", "val Dice", "limit %", ""], table)
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")
    for row in rows:
        if row["row"] in ("fastseg", "smp"):
            size = f"{row['parameters'] / 1e6:.2f} M parameters, {row['gflop_a_pair']:.1f} GFLOP a pair and step"
            print(f"{row['row']}: {size}; {row['dtype']} matrix product {row['matmul_tflops']:.2f} TFLOP/s")


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `fastseg.train` reaches: times as fast as the others, and whether its data keep up."""
    rate = {row["row"]: row["pairs_per_s"] for row in rows}
    ours = max({"fastseg", "graphs", "compile"} & set(rate), key=lambda name: rate[name], default=None)
    if ours is None:
        return {}
    times = {name: short(rate[ours] / rate[name]) for name in ("tutorial", "plain") if name in rate}
    print(f"{ours}:", ", ".join(f"{value:.2f} x {name}" for name, value in times.items()) or "no peer to compare with")
    efficiency = next(row["data_efficiency_pct"] for row in rows if row["row"] == ours)
    if efficiency is not None:
        verdict = "reached" if efficiency >= AIM_EFFICIENCY else "missed"
        print(f"data_efficiency_pct: {efficiency:.1f}, of the rate on a resident batch; {AIM_EFFICIENCY:.0f} {verdict}")
    return {"best": ours, "times_as_fast": times, "data_efficiency_pct": efficiency}


def draw(path: str, rows: list[dict[str, Any]], about: dict[str, Any], setting: Setting) -> None:
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
        "Each row has all that stands above it": [bar(row) for row in rows if row["row"] in WATERFALL],
        "Other loops": [bar(row) for row in rows if row["row"] in PEERS],
    }
    config = setting.config
    title = f"Training a UNet of {config.base_channels} channels, batch {config.batch_size}, 160x240: {describe(about)}"
    subtitle = (
        f"Later epochs over {len(setting.train_pairs)} Carvana-like pairs, files to weights; medians, half the "
        f"interquartile range as error bar;\nDice on {len(setting.val_pairs)} pairs of other cars after "
        f"{rows[0]['steps']} steps; the limit is the rate of a large matrix product"
    )
    draw_bars(
        path, title, subtitle, "pairs per second", {name: bars for name, bars in panels.items() if bars}, in_order=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with train_images and train_masks; default: make Carvana-like pairs")
    parser.add_argument("--pairs", type=int, default=256, help="training and validation together; default: %(default)s")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="of the cars; default: %(default)s")
    parser.add_argument("--channels", type=int, help="default: 64 on a GPU, 16 on a CPU")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=150, help="at least, in whole epochs; default: %(default)s")
    parser.add_argument("--rows", default=",".join([*WATERFALL, *PEERS]), help="default: all of %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="processes a row; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="resident against real data; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=cores(), help="decoding threads or processes; default: the cores, %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave the rows after fastseg out")
    parser.add_argument("--time-to-dice", type=float, metavar="DICE", help="measure the seconds to this Dice instead")
    parser.add_argument("--racers", default=",".join(RACERS), help="of --time-to-dice; default: all of %(default)s")
    parser.add_argument("--limit-s", type=float, default=600, help="of --time-to-dice; default: %(default)s")
    parser.add_argument("--json", default="", metavar="FILE", help="write the result here, and a chart beside it")
    options = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    known, wanted = {**WATERFALL, **PEERS}, options.rows.split(",")
    for flag, names, choices in (("--rows", wanted, known), ("--racers", options.racers.split(","), RACERS)):
        unknown = [name for name in names if name not in choices]
        if unknown:
            parser.error(f"{flag}: {', '.join(unknown)} unknown; known: {', '.join(choices)}")
    names = [name for name in known if name in wanted]
    about = machine()
    try:
        device = choose_runtime(Config(device=options.device)).device
        options.channels = options.channels or (64 if device.type == "cuda" else 16)
        pairs, data = carvana_pairs(options.data, options.pairs)
        setting = make_setting(options, pairs)
    except fastseg.FastsegError as error:
        parser.error(str(error))
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
        result = race(options.racers.split(","), setting, options.time_to_dice, options.limit_s, options.repeat)
        report("time_to_dice", {**result, **content}, about, PACKAGES, options.json)
        return
    missing = find_missing(names, options.no_compile, device)
    setting = setting._replace(reader_workers=best_workers([name for name in names if name not in missing], setting))
    runs = measure_all(names, setting, options.repeat, missing)
    rows = [summarise(name, done) for name, done in runs.items()]
    print_rows(rows, missing)
    content = {"rows": rows, **compare(rows), "missing": missing, **content, "rounds": options.rounds}
    if options.json and rows:
        draw(str(Path(options.json).with_suffix(".png")), rows, about, setting)
    report("training", content, about, PACKAGES, options.json)


if __name__ == "__main__":
    main()
