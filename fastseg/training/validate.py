"""The end of an epoch: its scores, its line in metrics.jsonl, its checkpoints, and warnings of black masks."""

import logging
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastseg.data.batch import Batch
from fastseg.errors import FastsegError
from fastseg.network.metrics import score_batches
from fastseg.quality.diagnosis import explain_predictions, foreground_shares, warn_of_uniform_masks
from fastseg.training.state import Run, save_epoch, save_last_and_wait
from fastseg.training.step.augment import resize
from fastseg.training.summary import log_epoch

__all__ = ["validate", "warn_of_black_masks", "warn_of_training_masks"]

log = logging.getLogger(__name__)


def validate(run: Run) -> None:
    """Score the epoch, write its line, start writing its checkpoints, and advance to the next."""
    began = time.perf_counter()
    model = run.eval_model.eval()
    try:
        height, width = _val_size(run)
        classes = len(run.config.classes)
        batches = shrink_batches(run.val_loader, height, width, classes=bool(classes))
        scores = score_batches(model, batches, run.runtime, classes)
    except FastsegError:  # such as a broken file: the epoch's steps must not be lost
        run.history.pop()
        save_last_and_wait(run)
        log.info("%s is saved; the same command scores epoch %d again", run.config.run_dir / "last.pt", run.epoch + 1)
        raise
    entry = run.history[-1]
    entry.update({f"val_{name}": value for name, value in scores.items()}, val_size=height)
    scored = time.perf_counter()
    run.seconds["validation"] += scored - began
    entry["epoch_seconds"] = entry["seconds"] + scored - began
    entry["elapsed_seconds"] = scored - run.start_time
    log.info(
        "%s: loss %.4f, val loss %.4f, val Dice %.4f, val IoU %.4f, %.0f pairs/s, data wait %.0f %%",
        *(run.title, entry["train_loss"], entry["val_loss"]),
        *(entry["val_dice"], entry["val_iou"], entry["pairs_per_s"], entry["data_wait_pct"]),
    )
    run.epoch, run.step = run.epoch + 1, 0
    run.loss_sum.zero_()
    save_epoch(run)
    if run.runtime.rank == 0:  # after the checkpoint, which a full disk must not cost
        log_epoch(run.config.run_dir, entry)
    run.seconds["checkpoints"] += time.perf_counter() - scored


def shrink_batches(batches: Iterable[Batch], height: int, width: int, *, classes: bool = False) -> Iterator[Batch]:
    """Decoded batches at `height` x `width`, by the filter of training; batches of that size stay as they are."""
    for batch in batches:
        if batch.masks.shape[1:] == (height, width) or not len(batch.masks):
            yield batch
            continue
        masks = batch.masks.unsqueeze(1)
        images, masks = resize(
            batch.images.permute(0, 3, 1, 2).float(), masks if classes else masks.float(), height, width
        )
        yield batch._replace(images=_to_bytes(images).permute(0, 2, 3, 1), masks=_to_bytes(masks)[:, 0])


def _to_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _val_size(run: Run) -> tuple[int, int]:
    """The size of the epoch's last step, so that scores are those of the images trained on; full at the run's end."""
    ends = run.is_finished if run.budget else run.epoch + 1 >= run.config.num_epochs
    return (run.config.image_height, run.config.image_width) if ends else run.size_of(run.steps_done - 1)


def warn_of_training_masks(run: Run) -> None:
    """Warn before the first step if all training masks are empty, or all are full."""
    if run.runtime.rank == 0 and not run.config.classes:
        run.mask_shares = foreground_shares(run.train_loader.pairs)
        if message := warn_of_uniform_masks(run.mask_shares):
            log.warning("%s", message)


def warn_of_black_masks(run: Run) -> None:
    """Warn after the first of several epochs whose predictions are no better than guessing."""
    if run.runtime.rank > 0 or run.warned or run.config.classes:
        return
    message = explain_predictions(run.history[-1], run.mask_shares, run.config.learning_rate, run.steps_done)
    run.warned = bool(message)
    if message:
        log.warning("%s", message)
