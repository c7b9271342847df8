"""A speedrun: seconds of training until the validation Dice reaches 0.97, 0.98 and 0.985.

    python benchmarks/speedrun.py --data data,hard --seeds 5 --json speedrun.json
    python benchmarks/speedrun.py --data data,hard --seeds 2 --rows default,muon
    python benchmarks/speedrun.py --base default --rows default,clip,cosine          changes of today's recipe
    python benchmarks/speedrun.py --rows "" --merge a.json,b.json      the table of several reports

Each run is `fastseg.train` in a process of its own, with the base's optimizer and batches and the other defaults,
except for the change that its row names. The bases: `adamw` in batches of 16, `batch_16` with Muon, and `default`, the
recipe as it is on a CPU. A change that is no field of `Config` replaces a function of the recipe.
All rows do the same work, counted in training pixels (times the square of `base_channels`, against 16), so that a
larger number of smaller steps or images is no advantage in itself. Seconds are those of the steps: start-up,
validation and pictures, which no row changes, are left out. On the CPU they are CPU seconds of the process, which
other programs change less; with one thread on a core of its own (`OMP_NUM_THREADS=1 taskset -c 0`) the two are the
same. Dice counts once images have their full size, and a time between two epochs is interpolated. A row wins where it
needs less time than the base by more than twice the standard error of the difference.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from command import folder_fields
from measure import in_fresh_process
from recipe import DEFAULT_SHARE, make_clipping_optimizer, work
from report import describe_machine, make_parser, print_table, run, some_of, write_report
from torch import nn

import fastseg
from fastseg.data.loader import Loader
from fastseg.network.unet import UNet, init_weights
from fastseg.runtime.device import choose_device
from fastseg.training import recipe
from fastseg.training.step.muon import norm_biases_of

AIMS = (0.97, 0.98, 0.985)
BASES: dict[str, dict[str, Any]] = {  # rows with which the others are compared, and their fields
    "adamw": {"optimizer": "adamw", "batch_size": 16},
    "batch_16": {"optimizer": "auto", "batch_size": 16},
    "default": {"optimizer": "auto", "batch_size": 8},
}
EPOCHS = 20  # of the recipe with 192 pairs
DEFAULT_WORK = work(1, DEFAULT_SHARE)  # mean of a step, in steps at full size
THREE = 0.3 * 48 * 64 / (160 * 240) + 0.4 * work(1, 1) + 0.3  # the same of `three_sizes`
Patches = dict[str, Any]  # a function as training imports it, and its replacement


class Row(NamedTuple):
    what: str
    fields: dict[str, Any] = {}  # noqa: RUF012  that differ from the defaults
    patch: Callable[[fastseg.Config, int], Patches] = lambda config, steps: {}
    work: float = DEFAULT_WORK
    channels: float = 1.0  # times `--channels`


def bias_rate(factor: float, config: fastseg.Config, steps: int) -> Patches:
    """Biases of batch norms learn faster (Jordan 2024, 94% on CIFAR-10 in 3.29 seconds, arXiv:2404.00498)."""

    def make(config: fastseg.Config, model: nn.Module) -> torch.optim.Optimizer:
        biases = norm_biases_of(model)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1 and p not in biases], "weight_decay": 0.0},
            {"params": list(biases), "weight_decay": 0.0, recipe.LR_FACTOR: factor},
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    return {"fastseg.training.setup.make_optimizer": make}


def muon(factor: float, bias_factor: float, config: fastseg.Config, steps: int) -> Patches:
    """Muon and the biases of batch norms at multiples of the learning rate."""
    return {"fastseg.training.recipe.MUON_FACTOR": factor, "fastseg.training.recipe.BIAS_FACTOR": bias_factor}


def muon_at_three_sizes(config: fastseg.Config, steps: int) -> Patches:
    return muon(1.0, 64.0, config, steps) | three_sizes(config, steps)


def three_sizes(config: fastseg.Config, steps: int) -> Patches:
    """A quarter of the size in the first 30 % of the steps, half until 70 %."""

    def size_of(config: fastseg.Config, step: float, total_steps: float) -> tuple[int, int]:
        if step < 0.3 * total_steps:
            return 48, 64
        return (80, 128) if step < 0.7 * total_steps else (config.image_height, config.image_width)

    return {"fastseg.training.state.training_size": size_of}


def freeze_first_block(config: fastseg.Config, steps: int) -> Patches:
    """The first block is not trained in the last fifth of the steps, so that nothing is propagated back to it."""

    def freeze(config: fastseg.Config, model: nn.Module, step: int) -> None:
        if step >= 0.8 * steps:
            for parameter in model.encoder[0].parameters():
                parameter.grad = None
                parameter.requires_grad_(False)

    return {"fastseg.training.loop.drop_frozen_gradients": freeze}


def alternating_flips(config: fastseg.Config, steps: int) -> Patches:
    """Each photo is flipped in every second epoch, from a random one of its first two on (Jordan 2024)."""
    batches = Loader.__iter__

    def iterate(loader: Loader) -> Any:
        flipped = torch.rand(len(loader.pairs), generator=torch.Generator().manual_seed(config.seed)) < 0.5
        epoch = loader.state_dict()["epoch"]
        for batch in batches(loader):
            if loader.shuffle:
                flip = flipped[torch.as_tensor(batch.indices)] ^ bool(epoch % 2)
                images = torch.where(flip[:, None, None, None], batch.images.flip(2), batch.images)
                masks = torch.where(flip[:, None, None], batch.masks.flip(2), batch.masks)
                batch = batch._replace(images=images, masks=masks)
            yield batch

    return {"fastseg.data.loader.Loader.__iter__": iterate}


def clipped(config: fastseg.Config, steps: int) -> Patches:
    return {"fastseg.training.setup.make_optimizer": make_clipping_optimizer}


def average_of_the_end(config: fastseg.Config, steps: int) -> Patches:
    """The average begins in the last quarter, as the plain mean of the weights, and replaces the network's own."""

    def update(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
        recipe.update_ema(ema_model, model, decay, max(step - round(0.75 * steps), 0))

    return {"fastseg.training.loop.update_ema": update}


def warm_up(share: float, config: fastseg.Config, steps: int) -> Patches:
    return {"fastseg.training.recipe.WARM_UP": share}


def cosine(config: fastseg.Config, steps: int) -> Patches:
    """The schedule of AdamW, two cosine arcs."""

    def rate(config: fastseg.Config, step: float, total_steps: float) -> float:
        return recipe.learning_rate(config.replace(optimizer="adamw"), step, total_steps)

    return {"fastseg.training.loop.learning_rate": rate}


def fresh_unet(config: fastseg.Config, steps: int) -> Patches:
    """Convolutions begin at He's scale for ReLU, 2.4 times torch's default (He et al. 2015)."""

    def initialise(model: UNet, generator: torch.Generator) -> None:
        init_weights(model, generator)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)

    return {"fastseg.network.checkpoint.init_weights": initialise}


ADAMW, MUON = {"optimizer": "adamw"}, {"optimizer": "muon"}
ROWS = {
    "default": Row("the recipe: Muon, batches of 8", BASES["default"]),
    "batch_16": Row("Muon, batches of 16", BASES["batch_16"]),
    "adamw": Row("AdamW", ADAMW),
    "bias_16": Row("AdamW, BatchNorm biases at 16 times the learning rate", ADAMW, partial(bias_rate, 16)),
    "bias_64": Row("AdamW, BatchNorm biases at 64 times the learning rate", ADAMW, partial(bias_rate, 64)),
    "muon": Row("Muon for 3x3 filters", MUON, partial(muon, 1.0, 1.0)),
    "muon_2": Row("Muon at twice the learning rate", MUON, partial(muon, 2.0, 1.0)),
    "muon_bias_16": Row("Muon, BatchNorm biases at 16 times", MUON, partial(muon, 1.0, 16.0)),
    "muon_bias": Row("Muon, BatchNorm biases at 64 times", MUON, partial(muon, 1.0, 64.0)),
    "muon_2_bias_16": Row("Muon at twice, BatchNorm biases at 16 times", MUON, partial(muon, 2.0, 16.0)),
    "muon_2_bias": Row("Muon at twice, BatchNorm biases at 64 times", MUON, partial(muon, 2.0, 64.0)),
    "muon_three": Row("Muon, biases at 64 times, three sizes", MUON, muon_at_three_sizes, THREE),
    "three_sizes": Row("three sizes: a quarter, a half, full", patch=three_sizes, work=THREE),
    "small_85": Row("small images in 85 % of the steps", {"progressive_resizing": 0.85}, work=work(1, 0.85)),
    "freeze": Row("the first block frozen in the last fifth", patch=freeze_first_block),
    "alternate": Row("alternating instead of random flips", {"flip": 0.0}, alternating_flips),
    "average": Row("average of the weights of the last quarter", {"ema_decay": 0.999}, average_of_the_end),
    "clip": Row("gradients clipped to norm 1", patch=clipped),
    "batch_4": Row("batches of 4", {"batch_size": 4}),
    "batch_32": Row("batches of 32", {"batch_size": 32}),
    "channels_12": Row("three quarters of the channels", work=DEFAULT_WORK * 0.75**2, channels=0.75),
    "channels_24": Row("one and a half times the channels", work=DEFAULT_WORK * 1.5**2, channels=1.5),
    "peak_2": Row("twice the learning rate", {"learning_rate": 2 * fastseg.Config().learning_rate}),
    "warm_10": Row("the learning rate rises in 10 % of the steps", patch=partial(warm_up, 0.1)),
    "cosine": Row("a learning rate of cosine arcs, as with AdamW", patch=cosine),
    "he": Row("weights from He's normal distribution", patch=fresh_unet),
}


def run_once(name: str, data: str, channels: int, seed: int, share: float, base: str) -> dict[str, Any]:
    """Train a row with one seed; the seconds of its steps until each Dice.

    Args:
        share: of the work of the default number of epochs.
        base: row whose optimizer and batches the run has where its own names none.
    """
    row = ROWS[name]
    channels = round(channels * row.channels)
    fields = {"base_channels": channels, "refiner_steps": 0, **BASES[base], **row.fields}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        epochs = max(2, round(EPOCHS * share * DEFAULT_WORK / row.work))
        config = fastseg.Config(**folder_fields(Path(data)), **fields, seed=seed, num_epochs=epochs, out_dir=out)
        pairs = len(fastseg.find_pairs(config.train_img_dir, config.train_mask_dir))
        if choose_device(config.device).type == "cpu":
            stack.enter_context(mock.patch("time.perf_counter", time.process_time))
        for target, replacement in row.patch(config, epochs * (pairs // config.batch_size)).items():
            stack.enter_context(mock.patch(target, replacement))
        history = fastseg.train(config).history
    seconds, curve = 0.0, []
    for entry in history:
        seconds += entry["seconds"]
        if entry["val_size"] == config.image_height:
            curve.append((round(seconds, 2), round(entry["val_dice"], 5)))
    times = {str(aim): time_to(aim, curve) for aim in AIMS}
    return {"seed": seed, "epochs": epochs, "seconds": round(seconds, 2), "dice": curve[-1][1], **times, "curve": curve}


def time_to(aim: float, curve: list[tuple[float, float]]) -> float | None:
    """Seconds until the curve first reaches a Dice, linear between its points; None if it does not.

    A curve that begins above it has reached it at its first point.
    """
    before = None
    for seconds, dice in curve:
        if dice >= aim:
            if before is None:
                return seconds
            share = (aim - before[1]) / (dice - before[1])
            return round(before[0] + share * (seconds - before[0]), 2)
        before = seconds, dice
    return None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def compare(runs: list[dict[str, Any]], base: list[dict[str, Any]], field: str) -> float | None:
    """The difference from `base` in standard errors, negative where it is less; None without both."""
    ours, theirs = ([run[field] for run in some if run[field] is not None] for some in (runs, base))
    if len(ours) < max(2, len(runs)) or len(theirs) < max(2, len(base)):
        return None
    (mean, error), (other, other_error) = mean_and_error(ours), mean_and_error(theirs)
    return (mean - other) / max(math.hypot(error, other_error), 1e-12)


def print_rows(sets: dict[str, dict[str, list[dict[str, Any]]]], base: str) -> None:
    """A table for each data set; `base` is the row with which the others are compared."""
    for data, rows in sets.items():
        table = []
        for name, runs in rows.items():
            cells = [ROWS[name].what, str(len(runs))]
            for field in (*map(str, AIMS), "seconds", "dice"):
                values = [run[field] for run in runs if run[field] is not None]
                digits = 5 if field == "dice" else 1
                cell = "-"
                if values:
                    mean, error = mean_and_error(values)
                    cell = f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
                    cell += f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
                cells.append(cell)
            errors = [compare(runs, rows.get(base, []), field) for field in ("0.98", "dice")]
            cells += ["-" if value is None or name == base else f"{value:+.1f}" for value in errors]
            table.append(cells)
        print(f"\n{data}; {describe_machine()}\n")
        aims = [f"s to {aim}" for aim in AIMS]
        print_table(["", "seeds", *aims, "all steps, s", "Dice", "s to 0.98, errors", "Dice, errors"], table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR,DIR", help="folders of `fastseg synth`")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, separated by commas")
    parser.add_argument(
        "--base",
        choices=BASES,
        default="adamw",
        help="row with which the others are compared, and whose optimizer and batches they have",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--work", type=float, default=1.0, help="share of the default's 20 epochs")
    parser.add_argument("--merge", metavar="FILES", default="", help="reports whose runs are added")
    options = parser.parse_args()
    names = some_of(ROWS)(options.rows) if options.rows else []
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in filter(None, options.merge.split(",")):
        report = json.loads(Path(path).read_text())
        if report.get("base", "adamw") != options.base:
            raise fastseg.ConfigError(f"{path}: its base is {report.get('base', 'adamw')}. Pass that as --base.")
        for data, rows in report["sets"].items():
            for name, runs in rows.items():
                sets.setdefault(data, {}).setdefault(name, []).extend(runs)

    def save(finished: bool) -> None:
        content = {"channels": options.channels, "work": options.work, "base": options.base, "sets": sets}
        write_report("speedrun", content, options.json, finished=finished)

    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in names:
            for data in options.data.split(","):
                print(f"{name}, {Path(data).name}, seed {seed}", file=sys.stderr)
                done = in_fresh_process(run_once, name, data, options.channels, seed, options.work, options.base)
                sets.setdefault(Path(data).name, {}).setdefault(name, []).append(done)
                save(finished=False)
    print_rows(sets, options.base)
    save(finished=True)


if __name__ == "__main__":
    run(main)
