"""How many photos and steps an outline refiner is trained with; with a time budget, its own times decide."""

import copy
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from fastseg.config import Config
from fastseg.data.decode import image_size
from fastseg.data.host import decode_file
from fastseg.data.pairs import Pairs
from fastseg.durations import format_duration
from fastseg.errors import DataError
from fastseg.network.outline.refiner import MAX_CLASSES, Refiner, choose_scale
from fastseg.training.budget import seconds_left, used_seconds
from fastseg.training.outline.patches import PATCH, Patches, cut_patches, read_examples
from fastseg.training.outline.score import score_refiner
from fastseg.training.outline.train import train_refiner
from fastseg.training.state import Run

__all__ = [
    "MAX_TRAIN",
    "MAX_VAL",
    "Plan",
    "may_refine",
    "new_refiner",
    "plan_refiner_photos",
    "plan_refiner_steps",
    "read_plan",
    "reserve_refiner_seconds",
]

MAX_TRAIN, MAX_VAL = 256, 32  # photos
# Of a time budget, for the refiner. Of 120 s on one core, a half gives worse masks. Of 60 s, in which a fifth of its
# steps would fit, a longer network and the CRF are as good.
SHARE, MIN_PART = 1 / 3, 0.4
TRAIN_SHARE, VAL_SHARE = 0.3, 0.15  # of the refiner's time, to prepare and to score photos
TIMED_PHOTOS, TIMED_STEPS = 3, 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The length of a refiner's training. `best.pt` stores it once the steps are known."""

    num_train: int  # photos
    num_val: int
    budget: float = 0.0  # seconds of the time budget for which it is; 0: there is none
    steps: int = 0  # 0: not known yet
    score_s: float = 0.0  # to score a photo


def may_refine(run: Run) -> bool:
    """Whether this process fits a refiner, if there is time."""
    return run.config.refiner_steps > 0 and len(run.config.classes) <= MAX_CLASSES and run.runtime.rank == 0


def new_refiner(pairs: Pairs, config: Config) -> Refiner:
    """An untrained refiner for photos of the size of the first one."""
    size = decode_file(pairs.image_path(0), image_size)
    refiner = Refiner(config.num_outputs, choose_scale((config.image_height, config.image_width), size))
    refiner.reset(torch.Generator().manual_seed(config.seed))
    return refiner


def reserve_refiner_seconds(run: Run) -> None:
    """Decide how much of a time budget the refiner gets, before the first step; a decision that is stored stays.

    It gets a third, or nothing where that is less than `MIN_PART` of the time of `refiner_steps`, as some steps on
    blank patches tell. In a run that is continued with a larger budget it gets at least as much as before: a new best
    network needs a new refiner.
    """
    budget = run.budget
    if budget is None or budget.refiner_seconds is not None or run.is_finished or not may_refine(run):
        return
    seconds = max(SHARE * (budget.seconds - used_seconds(run)), budget.former_refiner_seconds)
    try:
        refiner = new_refiner(run.train_loader.pairs, run.config)
        whole = run.config.refiner_steps * _time_steps(refiner, _blank_patches(refiner, run.config), run)
    except DataError:  # of the first photo, which the training reports or skips
        whole = 0.0
    budget.refiner_seconds = seconds if seconds > MIN_PART * whole else 0.0
    if not budget.refiner_seconds:
        log.info(
            "outline refiner: left out; the time_budget leaves it %s, and its refiner_steps take %s",
            *(format_duration(seconds), format_duration(whole)),
        )


def read_plan(state: dict[str, Any], run: Run) -> Plan | None:
    """What is decided already: by the settings, or with a time budget by what `best.pt` stores.

    Args:
        state: of `best.pt`.

    Returns:
        None if nothing is decided for this budget yet.
    """
    if not run.budget:
        return Plan(MAX_TRAIN, MAX_VAL, steps=run.config.refiner_steps)
    stored = state.get("refiner_plan")
    if not isinstance(stored, dict) or stored.keys() != {field.name for field in fields(Plan)}:
        return None
    plan = Plan(**stored)
    return plan if plan.budget == run.budget.seconds else None


def plan_refiner_photos(run: Run, refiner: Refiner, train_pairs: Pairs, val_pairs: Pairs) -> Plan:
    """Time a few photos, and choose as many as fit into their parts of the time that is left. The steps stay open.

    Args:
        train_pairs, val_pairs: at most `MAX_TRAIN` and `MAX_VAL`.

    Raises:
        DataError: a photo cannot be decoded.
    """
    assert run.budget is not None
    for number in (1, TIMED_PHOTOS):  # the first is slower
        began, some = time.perf_counter(), train_pairs.subset(range(min(number, len(train_pairs))))
        examples = read_examples(some, run.model, int(refiner.scale), run.config, run.runtime)
        cut_patches(examples, len(train_pairs), refiner, np.random.default_rng(0))
    photo_s = (time.perf_counter() - began) / len(some)
    untrained = run.runtime.to_device(copy.deepcopy(refiner)).eval()
    for number in (1, TIMED_PHOTOS):
        began, some = time.perf_counter(), val_pairs.subset(range(min(number, len(val_pairs))))
        with suppress(DataError):  # these few may have no pixel to score
            score_refiner(untrained, some, run)
    score_s = (time.perf_counter() - began) / len(some)
    left = _refiner_seconds_left(run)
    num_train, num_val = max(int(TRAIN_SHARE * left / photo_s), 1), max(int(VAL_SHARE * left / score_s), 1)
    return Plan(min(num_train, len(train_pairs)), min(num_val, len(val_pairs)), run.budget.seconds, score_s=score_s)


def plan_refiner_steps(plan: Plan, run: Run, refiner: Refiner, patches: Patches) -> Plan:
    """As many steps as fit into the time that is left before the validation photos are scored."""
    step_s = _time_steps(refiner, patches, run)
    left = _refiner_seconds_left(run) - plan.num_val * plan.score_s
    return replace(plan, steps=max(int(left / step_s), 1))


def _refiner_seconds_left(run: Run) -> float:
    """What is left of the time budget; of the refiner's part alone if the network's training has ended early."""
    assert run.budget is not None
    left = seconds_left(run)
    if not run.is_finished and run.budget.refiner_seconds:
        left = min(left, run.budget.refiner_seconds - (time.perf_counter() - run.refiner_start))
    return max(left, 0.0)


def _blank_patches(refiner: Refiner, config: Config) -> Patches:
    size = PATCH + 2 * refiner.halo
    photos, logits = torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.zeros(1, config.num_outputs, size, size)
    return Patches(photos, logits.half(), torch.zeros(1, PATCH, PATCH, dtype=torch.uint8))


def _time_steps(refiner: Refiner, patches: Patches, run: Run) -> float:
    """Seconds of a training step. The refiner itself stays as it is."""
    for number in (1, TIMED_STEPS):  # the first is slower
        began, trained = time.perf_counter(), copy.deepcopy(refiner)
        train_refiner(trained, patches, run, number, shown=False)
        trained.head.weight.sum().item()  # waits for a GPU
    return (time.perf_counter() - began) / TIMED_STEPS
