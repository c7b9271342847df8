"""The end of an epoch: its scores, its line in metrics.jsonl, its checkpoints, and warnings of black masks."""

import logging
import time

from fastseg.errors import FastsegError
from fastseg.network.metrics import score_batches
from fastseg.quality.diagnosis import explain_predictions, foreground_shares, warn_of_uniform_masks
from fastseg.training.state import Run, save_epoch, save_last_and_wait
from fastseg.training.summary import log_epoch

__all__ = ["validate", "warn_of_black_masks", "warn_of_training_masks"]

log = logging.getLogger(__name__)


def validate(run: Run) -> None:
    """Score the epoch, write its line, start writing its checkpoints, and advance to the next."""
    began = time.perf_counter()
    model = run.eval_model.eval()
    try:
        scores = score_batches(model, run.val_loader, run.runtime, len(run.config.classes))
    except FastsegError:  # such as a broken file: the epoch's steps must not be lost
        run.history.pop()
        save_last_and_wait(run)
        log.info("%s is saved; the same command scores epoch %d again", run.config.run_dir / "last.pt", run.epoch + 1)
        raise
    entry = run.history[-1]
    entry.update({f"val_{name}": value for name, value in scores.items()})
    scored = time.perf_counter()
    run.seconds["validation"] += scored - began
    entry["epoch_seconds"] = entry["seconds"] + scored - began
    entry["elapsed_seconds"] = scored - run.start_time
    log.info(
        "epoch %d/%d: loss %.4f, val loss %.4f, val Dice %.4f, val IoU %.4f, %.0f pairs/s, data wait %.0f %%",
        *(entry["epoch"], run.config.num_epochs, entry["train_loss"], entry["val_loss"]),
        *(entry["val_dice"], entry["val_iou"], entry["pairs_per_s"], entry["data_wait_pct"]),
    )
    run.epoch, run.step = run.epoch + 1, 0
    run.loss_sum.zero_()
    save_epoch(run)
    if run.runtime.rank == 0:  # after the checkpoint, which a full disk must not cost
        log_epoch(run.config.run_dir, entry)
    run.seconds["checkpoints"] += time.perf_counter() - scored


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
