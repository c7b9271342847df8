"""The end of a training: fit an outline refiner to the best network, and add it to `best.pt` if it helps."""

import logging
import math
import time
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
from fastseg.errors import DataError
from fastseg.network.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastseg.network.metrics import ClassScores, Scores
from fastseg.network.normalise import normalise
from fastseg.network.outline.crf import guide_size, refine_with_crf
from fastseg.network.outline.refiner import MAX_CLASSES, Refiner, choose_scale, refine_outline
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.progress import progress_bar
from fastseg.training.budget import seconds_left
from fastseg.training.outline.patches import Example, Patches, cut_patches, read_examples
from fastseg.training.state import Run

__all__ = ["fit_refiner", "train_refiner"]

MAX_TRAIN, MAX_VAL = 256, 32  # photos
TRAIN_SHARE, VAL_SHARE = 0.3, 0.1  # of the time that is left, to prepare and to score them
TIMED_PHOTOS, TIMED_STEPS = 4, 4
BATCH = 32  # patches per step
LEARNING_RATE, WARM_UP = 3e-3, 0.2  # peak of AdamW's one cycle, and the share of the steps in which it rises
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
    `best.pt`, as is that a refiner does not help. A budget too short for `min_steps` leaves it out. Only rank 0 does
    this. `run.model` may have the weights of `best.pt` afterwards.

    Raises:
        OutputError: `best.pt` cannot be written; it is as before.
    """
    began, config, path = time.perf_counter(), run.config, run.config.run_dir / "best.pt"
    if not config.refiner_steps or not run.history or len(config.classes) > MAX_CLASSES or run.runtime.rank > 0:
        return
    if run.budget and not run.budget.refines:
        log.info(
            "outline refiner: left out, because the network needed all of the time_budget for %d steps", run.steps_done
        )
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
        num_train, num_val, steps = state.get("refiner_plan") or _plan(run, train_pairs)
        if run.budget:
            state["refiner_plan"] = [num_train, num_val, steps]
            save_checkpoint(path, state)
        train_pairs, val_pairs = _sample(train_pairs, num_train, rng), _sample(val_pairs, num_val, rng)
        patches = _cut_patches(refiner, train_pairs, run, rng)
        if patches is None:
            log.info("outline refiner: not trained, because the masks of training photos have no outline yet")
        else:
            train_refiner(refiner, patches, run, steps)
            if run.stop_requested:
                run.interrupted = True
                log.info("interrupted while the outline refiner was trained; the same command trains it")
                return
            scores = _score_refiner(refiner.eval(), val_pairs, run)
    except DataError as error:  # the network is trained, which is worth more than its refiner
        log.warning("no outline refiner: %s", error)
    weights = {key: value.cpu() for key, value in refiner.state_dict().items()}
    added = {"refiner": weights if scores and scores["used"] else None, "refiner_scores": scores}
    save_checkpoint(path, {**state, **added})
    run.seconds["outline refiner"] += time.perf_counter() - began


def _plan(run: Run, pairs: Pairs) -> tuple[int, int, int]:
    """Number of training photos, of validation photos, and of steps: as configured, or as the time budget permits."""
    if run.budget is None:
        return MAX_TRAIN, MAX_VAL, run.config.refiner_steps
    refiner, rng = _new_refiner(pairs, run.config), np.random.default_rng(0)
    for number in (1, TIMED_PHOTOS):  # the first are slower
        began = time.perf_counter()
        patches = _cut_patches(refiner, pairs.subset(range(min(number, len(pairs)))), run, rng)
    photo_s = (time.perf_counter() - began) / min(TIMED_PHOTOS, len(pairs))
    step_s = 0.0
    if patches is not None:
        for number in (1, TIMED_STEPS):
            began = time.perf_counter()
            train_refiner(refiner, patches, run, number)
        step_s = (time.perf_counter() - began) / TIMED_STEPS
    left = max(seconds_left(run), 0.0)
    num_train, num_val = (
        min(max(int(share * left / photo_s), 1), most)
        for share, most in ((TRAIN_SHARE, MAX_TRAIN), (VAL_SHARE, MAX_VAL))
    )
    left -= (min(num_train, len(pairs)) + min(num_val, len(run.val_loader.pairs))) * photo_s
    return num_train, num_val, max(int(left / step_s), 1) if step_s else 1


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


def train_refiner(refiner: Refiner, patches: Patches, run: Run, steps: int) -> None:
    """Train on random patches; for fewer steps if a signal interrupts the run."""
    config, runtime = run.config, run.runtime
    refiner = runtime.to_device(refiner).train()
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=LEARNING_RATE, fused=runtime.device.type != "mps")
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    generator = torch.Generator().manual_seed(config.seed)
    with progress_bar() as bar:
        bar_task = bar.add_task("outline refiner", total=steps, note="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _cycle(step / steps)
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
    log.info(
        "outline refiner: Dice on a grid of %dx%d is %.4f with it, %s; it is %s",
        *(config.image_width * scale, config.image_height * scale, dice["learned"]),
        ", ".join(f"{value:.4f} with refine={method}" for method, value in others.items()),
        "in best.pt" if used else "not used",
    )
    return {"dice": dice, "images": len(pairs), "used": used}


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
