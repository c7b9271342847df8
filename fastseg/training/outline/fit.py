"""The end of a training: fit an outline refiner to the best network, and add it to `best.pt` if it helps."""

import copy
import logging
import math
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from fastseg.classes import IGNORED
from fastseg.config import Config
from fastseg.data.decode import image_size
from fastseg.data.host import decode_file
from fastseg.data.pairs import Pairs
from fastseg.durations import format_duration
from fastseg.errors import DataError
from fastseg.network.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastseg.network.metrics import ClassScores, Scores
from fastseg.network.normalise import normalise
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.refiner import MAX_CLASSES, Refiner, choose_scale, refine_outline
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.progress import progress_bar
from fastseg.training.budget import seconds_left, used_seconds
from fastseg.training.outline.patches import PATCH, Example, Patches, cut_patches, read_examples
from fastseg.training.state import Run
from fastseg.training.step.muon import MUON, MUON_FACTOR, MuonAdamW, filters_of

__all__ = ["fit_refiner", "reserve_refiner_seconds", "train_refiner"]

MAX_TRAIN, MAX_VAL = 256, 32  # photos
# Of a time budget, for the refiner: at least, and at most. With half of its steps, the CRF is better than it.
MIN_SHARE, MAX_SHARE = 1 / 3, 0.6
TRAIN_SHARE, VAL_SHARE = 0.3, 0.15  # of the refiner's time, to prepare and to score photos
TIMED_PHOTOS, TIMED_STEPS = 3, 16
BATCH = 16  # patches per step
LEARNING_RATE, WARM_UP = 1e-2, 0.2  # peak of the one cycle, and the share of the steps in which it rises
MAX_NORM = 1.0  # of the gradients
UNCERTAIN = 5.0  # |logit|, or the distance of the two largest, below which a point has the full weight in the loss
CERTAIN_WEIGHT = 0.05  # of the others
# The network sees the photos of its training better than new ones: smooth noise makes its outlines as bad as those.
NOISE, NOISE_POINTS = 2.0, 16
GAIN, OFFSET = 0.2, 0.3  # largest change of a patch's contrast, and of its normalised brightness

log = logging.getLogger(__name__)


def fit_refiner(run: Run) -> None:
    """Fit a refiner to the network of `best.pt`, and add it there if it improves the validation masks.

    It depends on that network, the data and the seed alone: a run that is killed or interrupted meanwhile fits it from
    the beginning. With a time budget its length follows from the time that is left; it is decided once and stored in
    `best.pt`, as is that a refiner does not help. Only rank 0 does this. `run.model` may have the weights of `best.pt`
    afterwards.

    Raises:
        OutputError: `best.pt` cannot be written; it is as before.
    """
    began, config, path = time.perf_counter(), run.config, run.config.run_dir / "best.pt"
    if not _may_refine(run) or not run.history or (run.budget and not run.budget.refiner_seconds):
        return
    state = load_checkpoint(path)
    if "refiner" in state:
        return
    load_weights(run.model, state, path, config)
    run.model.eval()
    rng = np.random.default_rng((config.seed, 1))
    train_pairs = _sample(run.train_loader.pairs.without(run.train_loader.bad.found), MAX_TRAIN, rng)
    val_pairs = _sample(run.val_loader.pairs.without(run.val_loader.bad.found), MAX_VAL, rng)
    refiner, scores = _new_refiner(train_pairs, config), None
    try:
        plan = state.get("refiner_plan", [])
        if not run.budget:
            num_train, num_val, steps = MAX_TRAIN, MAX_VAL, config.refiner_steps
        elif plan[3:] == [run.budget.seconds]:
            num_train, num_val, steps = plan[:3]
        else:
            num_train, num_val, score_s = _plan_photos(run, refiner, train_pairs, val_pairs)
            steps = 0
        train_pairs, val_pairs = _sample(train_pairs, num_train, rng), _sample(val_pairs, num_val, rng)
        patches = _cut_patches(refiner, train_pairs, run, rng)
        if patches is None:
            log.info("outline refiner: not trained, because the masks of training photos have no outline yet")
        else:
            if not steps:
                left = seconds_left(run) - len(val_pairs) * score_s
                steps = max(int(left / _time_steps(refiner, patches, run)), 1)
                if run.budget and not run.stop_requested:  # a signal cuts the timing short
                    state["refiner_plan"] = [num_train, num_val, steps, run.budget.seconds]
                    save_checkpoint(path, state)
            train_refiner(refiner, patches, run, steps)
            if run.stop_requested:
                run.interrupted = True
                log.info("interrupted while the outline refiner was trained; the same command trains it")
                return
            scores = _score_refiner(refiner.eval(), val_pairs, run)
            _log_scores(scores, int(refiner.scale), config)
    except DataError as error:  # the network is trained, which is worth more than its refiner
        log.warning("no outline refiner: %s", error)
    weights = {key: value.cpu() for key, value in refiner.state_dict().items()}
    added = {"refiner": weights if scores and scores["used"] else None, "refiner_scores": scores}
    save_checkpoint(path, {**state, **added})
    run.seconds["outline refiner"] += time.perf_counter() - began


def _may_refine(run: Run) -> bool:
    """Whether this process fits a refiner, if there is time."""
    return run.config.refiner_steps > 0 and len(run.config.classes) <= MAX_CLASSES and run.runtime.rank == 0


def reserve_refiner_seconds(run: Run) -> None:
    """Decide how much of a time budget the refiner gets, before the first step; a decision that is stored stays.

    It gets a third, or the time of `refiner_steps` if that is more, as some steps on blank patches tell. Where that
    leaves the network too little, it gets nothing: a longer network and the CRF are better than a short refiner.
    """
    budget = run.budget
    if budget is None or budget.refiner_seconds is not None or run.is_finished or not _may_refine(run):
        return
    left = budget.seconds - used_seconds(run)
    try:
        refiner = _new_refiner(run.train_loader.pairs, run.config)
        whole = run.config.refiner_steps * _time_steps(refiner, _blank_patches(refiner, run.config), run)
    except DataError:  # of the first photo, which the training reports or skips
        whole = 0.0
    whole *= 1.25  # photos are prepared before the steps, and scored after them
    budget.refiner_seconds = max(whole, MIN_SHARE * left) if whole <= MAX_SHARE * left else 0.0
    if not budget.refiner_seconds:
        log.info(
            "outline refiner: left out; it would take %s, more than %.0f %% of the time_budget",
            *(format_duration(whole), 100 * MAX_SHARE),
        )


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


def _plan_photos(run: Run, refiner: Refiner, train_pairs: Pairs, val_pairs: Pairs) -> tuple[int, int, float]:
    """Numbers of training and validation photos that fit into their parts of the time, and seconds to score a photo."""
    for number in (1, TIMED_PHOTOS):  # the first is slower
        began, some = time.perf_counter(), train_pairs.subset(range(min(number, len(train_pairs))))
        examples = read_examples(some, run.model, int(refiner.scale), run.config, run.runtime)
        cut_patches(examples, len(train_pairs), refiner, np.random.default_rng(0))
    photo_s = (time.perf_counter() - began) / len(some)
    untrained = run.runtime.to_device(copy.deepcopy(refiner)).eval()
    for number in (1, TIMED_PHOTOS):
        began, some = time.perf_counter(), val_pairs.subset(range(min(number, len(val_pairs))))
        with suppress(DataError):  # these few may have no pixel to score
            _score_refiner(untrained, some, run)
    score_s = (time.perf_counter() - began) / len(some)
    left = max(seconds_left(run), 0.0)
    num_train, num_val = int(TRAIN_SHARE * left / photo_s), int(VAL_SHARE * left / score_s)
    return min(max(num_train, 1), MAX_TRAIN), min(max(num_val, 1), MAX_VAL), score_s


def _sample(pairs: Pairs, count: int, rng: np.random.Generator) -> Pairs:
    chosen = rng.permutation(len(pairs))[:count]
    return pairs.subset(np.sort(chosen).tolist())


def _new_refiner(pairs: Pairs, config: Config) -> Refiner:
    size = decode_file(pairs.image_path(0), image_size)
    refiner = Refiner(config.num_outputs, choose_scale((config.image_height, config.image_width), size))
    refiner.reset(torch.Generator().manual_seed(config.seed))
    return refiner


def _cut_patches(refiner: Refiner, pairs: Pairs, run: Run, rng: np.random.Generator) -> Patches | None:
    examples = read_examples(pairs, run.model, int(refiner.scale), run.config, run.runtime)
    return cut_patches(examples, len(pairs), refiner, rng)


def train_refiner(refiner: Refiner, patches: Patches, run: Run, steps: int, *, shown: bool = True) -> None:
    """Train on random patches; for fewer steps if a signal interrupts the run."""
    config, runtime = run.config, run.runtime
    refiner = runtime.to_device(refiner).train()
    filters, parameters = filters_of(refiner), list(refiner.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p not in filters]},
        {"params": [p for p in parameters if p in filters], MUON: True},
    ]
    optimizer = MuonAdamW(groups, lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    generator = torch.Generator().manual_seed(config.seed)
    with progress_bar(shown=shown) as bar:
        bar_task = bar.add_task("outline refiner", total=steps, note="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _cycle(step / steps) * (MUON_FACTOR if group.get(MUON) else 1)
            chosen = torch.randint(len(patches.photos), (BATCH,), generator=generator)
            photos, logits, masks = _augment(patches, chosen, config, generator)
            photos, logits, masks = (values.to(runtime.device) for values in (photos, logits, masks))
            with runtime.autocast():
                refined = refiner(photos, logits)
            inside = slice(refiner.halo, -refiner.halo)
            loss = refiner_loss(refined, logits[..., inside, inside], masks, config)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(refiner.parameters(), MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update(bar_task, advance=1)
            if run.stop_requested:
                return


def _cycle(progress: float) -> float:
    return progress / WARM_UP if progress < WARM_UP else (1 - progress) / (1 - WARM_UP)


def _augment(
    patches: Patches, chosen: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Photos, logits and masks of a step, on the CPU: mirrored, recoloured, and with noise on the logits."""
    photos, logits, masks = normalise(patches.photos[chosen]), patches.logits[chosen].float(), patches.masks[chosen]
    count, (height, width) = len(chosen), logits.shape[2:]
    flip = torch.rand(count, generator=generator) < config.flip
    for values in (photos, logits, masks):
        values[flip] = values[flip].flip(-1)
    gain, offset = (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1).unbind()
    photos = photos * (1 + GAIN * gain) + OFFSET * offset
    points = (height // NOISE_POINTS + 2, width // NOISE_POINTS + 2)
    noise = torch.randn(count, logits.shape[1], *points, generator=generator)
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return photos, logits + strength * interpolate(noise, (height, width), mode="bicubic"), masks


def refiner_loss(refined: Tensor, logits: Tensor, masks: Tensor, config: Config) -> Tensor:
    """Cross-entropy where the network is uncertain, and a little of it elsewhere.

    Args:
        refined, logits: (B, C, H, W) after and before the refiner.
        masks: (B, H, W) uint8: coverage 0..255, or numbers of classes and IGNORED.

    Returns:
        Scalar float32.
    """
    if config.classes:
        losses = cross_entropy(refined, masks.long(), ignore_index=IGNORED, reduction="none")
        largest = logits.topk(2, 1).values
        margin, counted = largest[:, 0] - largest[:, 1], masks != IGNORED
    else:
        losses = binary_cross_entropy_with_logits(refined[:, 0], masks.float() / 255, reduction="none")
        margin, counted = logits[:, 0].abs(), torch.ones_like(masks, dtype=torch.bool)
    weights = torch.where(margin < UNCERTAIN, 1.0, CERTAIN_WEIGHT) * counted
    return (losses * weights).sum() / weights.sum().clamp(min=1)


@torch.inference_mode()
def _score_refiner(refiner: Refiner, pairs: Pairs, run: Run) -> dict[str, Any]:
    """Dice of validation pairs on the refiner's grid: upsampled, after the CRF, and refined."""
    config, scale = run.config, int(refiner.scale)
    methods = ("none", "crf", "learned")
    scores = {method: ClassScores(len(config.classes)) if config.classes else Scores() for method in methods}
    for example in read_examples(pairs, run.model, scale, config, run.runtime):
        for method in methods:
            logits = _refine_example(example, method, refiner)
            if config.classes:
                scores[method].update(logits.argmax(0)[None], example.mask[None])
            else:
                scores[method].update(logits > 0, example.mask[None] >= 128)
    dice = {method: float(score.compute()["dice"]) for method, score in scores.items()}
    others = {method: value for method, value in dice.items() if method != "learned"}
    used = math.isfinite(dice["learned"]) and dice["learned"] > max(others.values())
    return {"dice": dice, "images": len(pairs), "used": used}


def _log_scores(scores: dict[str, Any], scale: int, config: Config) -> None:
    log.info(
        "outline refiner: Dice on a grid of %dx%d is %s; it is %s",
        *(config.image_width * scale, config.image_height * scale),
        ", ".join(f"{dice:.4f} with refine={method}" for method, dice in scores["dice"].items()),
        "in best.pt" if scores["used"] else "not used",
    )


def _refine_example(example: Example, method: str, refiner: Refiner) -> Tensor:
    """The logits (C, H, W) of an example on the refiner's grid."""
    grid = (example.mask.shape[0], example.mask.shape[1])
    if method == "learned":
        return refine_outline(refiner, example.logits, example.photo, example.size)
    logits = example.logits[None]
    if method == "crf":
        pixels = example.photo.permute(2, 0, 1)[None].float()
        guide = interpolate(pixels, guide_size(*logits.shape[2:]), mode="area").round().to(torch.uint8)
        logits = refine_with_crf(logits, guide.permute(0, 2, 3, 1).contiguous(), example.size)
    return upsample_logits(logits, *example.size, onto=grid)[0]
