"""Seconds from the start of a process until validation first reaches a Dice: fastseg's recipes and the tutorials' loop.

`training.py --time-to-dice` starts it. Python, imports, decoding, compiling, validation and checkpoints all count. The
recipes are the command `fastseg train`, whose metrics.jsonl is watched; the loop is the first row of `trainers.py`,
scored after each epoch.
"""

import itertools
import json
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from command import folder_fields, last_line, train_command
from files import link_pairs
from measure import in_fresh_process, median, run_in_turn, spread
from report import plus_minus, print_table
from trainers import Setting, make_trainer

from fastseg.network.metrics import score_batches

RACERS = {
    "fast": "fastseg train with its defaults",
    "tutorial": "fastseg train --recipe tutorial",
    "loop": "the tutorials' loop: torch DataLoader, Pillow, kornia's classes, Adam, float32",
}
POLL_S = 0.02  # between reads of metrics.jsonl
STOP_S = 60.0  # from the request to stop until the process is killed
MAX_EPOCHS = 10_000  # of a recipe without a schedule: the time limit ends it first
numbers = itertools.count()  # of the runs


def race(names: list[str], setting: Setting, target: float, limit_s: float, repeat: int) -> dict[str, Any]:
    """Run the racers in turn and print the table; returns `rows`, and the racers that are `missing` with the reason."""

    def race_once(name: str, folder: Path) -> dict[str, Any]:
        if name == "loop":
            return in_fresh_process(run_loop, setting, target, limit_s, time.monotonic())
        return run_command(racer_command(name, setting, folder), target, limit_s)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_setting(setting, folder)
        runs, missing = run_in_turn({name: partial(race_once, name, folder) for name in names}, repeat)
    rows = [summarise(name, done) for name, done in runs.items()]
    table = []
    for row in rows:
        seconds = f"not reached in {limit_s:g} s; best Dice {row['best_dice']:.4f}"
        if row["seconds"] is not None:
            seconds = plus_minus(row["seconds"], row["seconds_spread"], 1)
        table.append([row["racer"], seconds, str(row["epochs"]), row["note"]])
    print_table(["", f"seconds to Dice {target:g}", "epochs", ""], table, missing)
    return {"rows": rows, "missing": missing, "target": target, "limit_s": limit_s}


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of the seconds, if all runs reached the target."""
    seconds = [run["seconds"] for run in runs]
    reached = None not in seconds
    return {
        "racer": name,
        "note": RACERS[name],
        "seconds": round(median(seconds), 2) if reached else None,
        "seconds_spread": round(spread(seconds), 2) if reached else None,
        "best_dice": round(max(run["best_dice"] for run in runs), 5),
        "epochs": max(run["epochs"] for run in runs),
        "runs": runs,
    }


def link_setting(setting: Setting, folder: Path) -> None:
    """Link the pairs of a setting into the four folders of `command.folder_fields`."""
    link_pairs(setting.train_pairs, folder, "train", len(setting.train_pairs))
    link_pairs(setting.val_pairs, folder, "val", len(setting.val_pairs))


def racer_command(recipe: str, setting: Setting, folder: Path) -> list[str]:
    config = setting.config
    fields = {
        **folder_fields(folder),
        "recipe": recipe,
        "base_channels": config.base_channels,
        "num_workers": config.num_workers,
        "device": config.device,
        "out_dir": folder / "runs",
        "name": f"{recipe}-{next(numbers)}",
    }
    if recipe == "tutorial":  # its learning rate does not depend on the number of epochs
        fields |= {"num_epochs": MAX_EPOCHS, "compile": "off", "batch_size": config.batch_size}
    return train_command(**fields)


def run_command(command: list[str], target: float, limit_s: float) -> dict[str, Any]:
    """Watch `fastseg train` until it reaches the Dice, ends, or exceeds its time.

    Raises:
        RuntimeError: the command failed; with the last line that it printed.
    """
    run_dir = Path(command[command.index("--out-dir") + 1], command[command.index("--name") + 1])
    with tempfile.TemporaryFile("w+") as printed:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=printed)
        try:
            while True:
                ended = process.poll() is not None  # before the read, so that the last epoch counts
                dice, elapsed = read_dice(run_dir), time.monotonic() - started
                reached = bool(dice) and max(dice) >= target
                if reached or ended or elapsed > limit_s:
                    break
                time.sleep(POLL_S)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if ended and process.returncode:
            printed.seek(0)
            raise RuntimeError(f"fastseg train failed: {last_line(printed.read())}")
    return {
        "seconds": round(elapsed, 2) if reached else None,
        "best_dice": max(dice, default=0.0),
        "epochs": len(dice),
    }


def read_dice(run_dir: Path) -> list[float]:
    """The Dice of each epoch whose line is complete; 0 where it is that of small images, which others do not see."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    height = json.loads((run_dir / "config.json").read_text())["image_height"]
    entries = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [entry["val_dice"] if entry["val_size"] == height else 0.0 for entry in entries]


def run_loop(setting: Setting, target: float, limit_s: float, started: float) -> dict[str, Any]:
    """The tutorials' loop in this process; `started` is the time.monotonic() before the process started."""
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
