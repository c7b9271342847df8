"""Seconds from the start of `fastseg train` to its end, and to a Dice: the whole of Carvana in three epochs.

    python benchmarks/end_to_end.py                                          # 5,088 pairs, 64 channels, 3 epochs
    python benchmarks/end_to_end.py --pairs 256 --channels 8 --ways eager    # a small one, for a CPU

Carvana-like files, used again under other names up to `--pairs`; a tenth is validation, of cars that training never
sees. Each way is the command itself in a process of its own: `eager` does not compile, `graphs` records CUDA graphs
(on a GPU only), `cold` compiles into an empty folder, `warm` finds there what `cold` left, `auto` is the default with
that folder. Everything counts: Python, imports, looking at the files, decoding, compiling, validation, checkpoints,
pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import carvana_pairs, describe, machine, print_table, report

import fastseg
from fastseg.runtime.device import choose_device

WAYS = {"eager": "off", "graphs": "graphs", "cold": "on", "warm": "on", "auto": "auto"}  # and its `compile`
VAL_SHARE = 0.1
TARGETS = (0.97, 0.99)


def link_pairs(pairs: fastseg.Pairs, folder: Path, split: str, count: int) -> None:
    """`count` pairs under names of their own, as many of them links to one file as it takes."""
    for kind in ("images", "masks"):
        (folder / f"{split}_{kind}").mkdir()
    for index in range(count):
        again, at = divmod(index, len(pairs))
        for kind, path in (("images", pairs.image_path(at)), ("masks", pairs.mask_path(at))):
            source = Path(path).absolute()
            (folder / f"{split}_{kind}" / f"{again:03d}{source.name}").symlink_to(source)


def train(folder: Path, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command; its summary, and when each epoch's Dice was known.

    Raises:
        SystemExit: the command failed; with what it said last.
    """
    fields = {
        **{f"{split}_{kind[:-1] if kind == 'masks' else 'img'}_dir": folder / f"{split}_{kind}"
           for split in ("train", "val") for kind in ("images", "masks")},
        "base_channels": options.channels,
        "num_epochs": options.epochs,
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "device": options.device,
        "compile": WAYS[way],
        "out_dir": folder / "runs",
        "name": way,
    }  # fmt: skip
    flags = [text for field, value in fields.items() for text in (f"--{field.replace('_', '-')}", str(value))]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "fastseg", "train", *flags], capture_output=True, text=True, env=environment
    )
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"fastseg train failed: {(done.stderr.splitlines() or ['it said nothing'])[-1]}")
    run_dir = folder / "runs" / way
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    begun = seconds - summary["seconds"]  # Python and the imports, before fastseg.train
    parts = {"python and imports": round(begun, 2), **summary["seconds_by_part"]}
    return {
        "way": way,
        "seconds": round(seconds, 2),
        "val_dice": round(summary["val_dice"], 5),
        "pairs_per_s": round(summary["pairs_per_s"], 1),
        "data_wait_pct": [round(line["data_wait_pct"], 2) for line in lines],
        **{f"seconds_to_{target}": seconds_to(target, lines, begun) for target in TARGETS},
        "seconds_by_part": parts,
        "device": summary["device"],
    }


def seconds_to(target: float, lines: list[dict[str, Any]], begun: float) -> float | None:
    """From the process's start until an epoch's score reached the target; None if none did."""
    reached = [line["elapsed_seconds"] for line in lines if line["val_dice"] >= target]
    return round(begun + reached[0], 2) if reached else None


def show(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        waits = " / ".join(f"{wait:.1f}" for wait in row["data_wait_pct"])
        to = [f"{row[f'seconds_to_{target}'] or '-'}" for target in TARGETS]
        table.append([row["way"], f"{row['seconds']:.1f}", *to, f"{row['val_dice']:.4f}", waits])
    print_table(
        ["way", "seconds", *(f"to Dice {target}" for target in TARGETS), "Dice", "data wait, % by epoch"], table
    )
    for row in rows:
        parts = sorted(row["seconds_by_part"].items(), key=lambda part: -part[1])
        print(f"{row['way']}: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder with train_images, ...; default: generated pairs")
    parser.add_argument("--files", type=int, default=256, help="different pairs to make where there is no --data")
    parser.add_argument("--pairs", type=int, default=5088)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)}, in that order; default: all that this machine can")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    on_gpu = choose_device(options.device).type == "cuda"
    ways = options.ways.split(",") if options.ways else [way for way in WAYS if on_gpu or way != "graphs"]
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: knows {', '.join(WAYS)}; got {', '.join(sorted(unknown))}")
    if "graphs" in ways and not on_gpu:
        parser.error("--ways: graphs needs a GPU. Give the others.")
    about = machine()
    pairs, files = carvana_pairs(options.data, options.files)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_pairs, val_pairs = fastseg.split_by_group(pairs, VAL_SHARE, seed=0)
        val_count = round(VAL_SHARE * options.pairs)
        link_pairs(train_pairs, folder, "train", options.pairs - val_count)
        link_pairs(val_pairs, folder, "val", val_count)
        rows = []
        for way in ways:
            print(f"{way}: fastseg train on {options.pairs - val_count} + {val_count} pairs", file=sys.stderr)
            rows.append(train(folder, way, options))
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(
        f"\n{options.pairs} pairs, {options.channels} channels, {options.epochs} epochs, batch {options.batch_size}; "
    )
    print(f"{describe(about)}\n")
    show(rows)
    settings = {"pairs": options.pairs, "channels": options.channels, "epochs": options.epochs}
    report("end_to_end", {"rows": rows, "settings": settings, "files": files}, about, ("kornia",), options.json)


if __name__ == "__main__":
    try:
        main()
    except fastseg.FastsegError as error:
        sys.exit(f"end_to_end.py: {error}")
