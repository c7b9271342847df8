"""Seconds from the start of a process until validation first reaches a Dice: fastseg's recipes and the tutorials' loop.

`training.py --time-to-dice` starts it. Python, imports, decoding, compiling, validation and checkpoints all count. The
recipes are the command `fastseg train`, whose metrics.jsonl is watched; the loop is the first row of `trainers.py`,
scored after each epoch.
"""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from loader import in_fresh_process
from measure import median, one_line, print_table
from trainers import Setting, make_trainer

from fastseg.network.metrics import score_batches

RACERS = {
    "fast": "fastseg train, as it is",
    "tutorial": "fastseg train --recipe tutorial",
    "loop": "the tutorials' loop: torch DataLoader, Pillow, kornia's classes, Adam, float32",
}
LOOK_S = 0.02  # between looks at metrics.jsonl
END_S = 60.0  # that a run which is asked to stop may take
ENDLESS = 10_000  # epochs of what has no schedule: the limit ends them


def race(names: list[str], setting: Setting, target: float, limit_s: float, repeat: int) -> dict[str, Any]:
    """Run the racers in turn and print the table; `rows`, and the racers that are `missing` with the reason."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        link_files(setting, Path(folder))
        for turn in range(repeat):
            for name in list(runs):
                print(f"{name}: run {turn + 1} of {repeat}", file=sys.stderr)
                try:
                    if name == "loop":
                        run = in_fresh_process(run_loop, setting, target, limit_s, time.monotonic())
                    else:
                        run = run_command(train_command(name, setting, Path(folder), turn), target, limit_s)
                    runs[name].append(run)
                except (ImportError, OSError, RuntimeError, ValueError, BrokenProcessPool) as error:
                    missing[name] = one_line(error)
                    del runs[name]
    rows = [summarise(name, done) for name, done in runs.items()]
    table = []
    for row in rows:
        best = f"not reached in {limit_s:g} s; best Dice {row['best_dice']:.4f}"
        seconds = best if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.append([row["racer"], seconds, str(row["epochs"]), row["note"]])
    print_table(["", f"seconds to Dice {target:g}", "epochs", "what"], table)
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")
    return {"rows": rows, "missing": missing, "target": target, "limit_s": limit_s}


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of the runs, if all got there."""
    seconds = [run["seconds"] for run in runs]
    return {
        "racer": name,
        "note": RACERS[name],
        "seconds": None if None in seconds else round(median(seconds), 2),
        "best_dice": round(max(run["best_dice"] for run in runs), 5),
        "epochs": max(run["epochs"] for run in runs),
        "runs": runs,
    }


def link_files(setting: Setting, folder: Path) -> None:
    """The pairs of the setting as the four folders that the command takes."""
    for split, pairs in (("train", setting.train_pairs), ("val", setting.val_pairs)):
        for kind, path in (("images", pairs.image_path), ("masks", pairs.mask_path)):
            place = folder / f"{split}_{kind}"
            place.mkdir()
            for source in {Path(path(index)).absolute() for index in range(len(pairs))}:
                (place / source.name).symlink_to(source)


def train_command(recipe: str, setting: Setting, folder: Path, turn: int) -> list[str]:
    config = setting.config
    fields = {
        "train_img_dir": folder / "train_images",
        "train_mask_dir": folder / "train_masks",
        "val_img_dir": folder / "val_images",
        "val_mask_dir": folder / "val_masks",
        "recipe": recipe,
        "base_channels": config.base_channels,
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "device": config.device,
        "out_dir": folder / "runs",
        "name": f"{recipe}-{turn}",
    }
    if recipe == "tutorial":  # has one learning rate throughout, so it can go on for as long as it may
        fields |= {"num_epochs": ENDLESS, "compile": "off"}
    flags = [text for field, value in fields.items() for text in (f"--{field.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "fastseg", "train", *flags]


def run_command(command: list[str], target: float, limit_s: float) -> dict[str, Any]:
    """Watch `fastseg train` until its Dice is there, it ends, or its time is over.

    Raises:
        RuntimeError: the command failed; with what it said last.
    """
    run_dir = Path(command[command.index("--out-dir") + 1], command[command.index("--name") + 1])
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while True:
                ended = process.poll() is not None  # before the look: what was written until then counts
                dice, elapsed = read_dice(run_dir / "metrics.jsonl"), time.monotonic() - started
                reached = bool(dice) and max(dice) >= target
                if reached or ended or elapsed > limit_s:
                    break
                time.sleep(LOOK_S)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if ended and process.returncode:
            said.seek(0)
            raise RuntimeError(f"fastseg train failed: {(said.read().splitlines() or ['it said nothing'])[-1]}")
    return {
        "seconds": round(elapsed, 2) if reached else None,
        "best_dice": max(dice, default=0.0),
        "epochs": len(dice),
    }


def read_dice(path: Path) -> list[float]:
    """Of each epoch whose line is whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["val_dice"] for line in lines if line.endswith("\n")]


def run_loop(setting: Setting, target: float, limit_s: float, started: float) -> dict[str, Any]:
    """The tutorials' loop in this process, whose start was asked for at `started`, on the clock of time.monotonic."""
    trainer = make_trainer("tutorial", setting)
    dice: list[float] = []
    while True:
        for images, masks, _ in trainer.epoch():
            trainer.step(images, masks)
            if time.monotonic() - started > limit_s:
                return {"seconds": None, "best_dice": max(dice, default=0.0), "epochs": len(dice)}
        trainer.run.model.eval()
        dice.append(score_batches(trainer.run.model, trainer.run.val_loader, trainer.run.runtime)["dice"])
        trainer.run.model.train()
        elapsed = time.monotonic() - started
        if dice[-1] >= target:
            return {"seconds": round(elapsed, 2), "best_dice": dice[-1], "epochs": len(dice)}
