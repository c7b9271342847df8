"""The end of a training: fit an outline refiner to the best network, and add it to `best.pt` if it helps."""

import logging
import time
from dataclasses import asdict

import numpy as np

from fastseg.data.pairs import Pairs
from fastseg.errors import DataError
from fastseg.network.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastseg.network.outline.refiner import Refiner
from fastseg.training.outline.patches import Patches, cut_patches, read_examples
from fastseg.training.outline.plan import (
    MAX_TRAIN,
    MAX_VAL,
    may_refine,
    new_refiner,
    plan_refiner_photos,
    plan_refiner_steps,
    read_plan,
)
from fastseg.training.outline.score import log_scores, score_refiner
from fastseg.training.outline.train import train_refiner
from fastseg.training.state import Run

__all__ = ["fit_refiner"]

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
    path, run.refiner_start = run.config.run_dir / "best.pt", time.perf_counter()
    if not may_refine(run) or not run.history:
        return
    state = load_checkpoint(path)
    same_steps = run.budget or state["config"].get("refiner_steps") == run.config.refiner_steps
    if "refiner" in state and same_steps:
        return
    if run.budget and not run.budget.refiner_seconds:
        if run.budget.refiner_seconds is None:
            log.info("outline refiner: not trained, because nothing of the time_budget is left; raise it")
        return
    load_weights(run.model, state, path, run.config)
    run.model.eval()
    rng = np.random.default_rng((run.config.seed, 1))
    train_pairs = _sample(run.train_loader.pairs.without(run.train_loader.bad.found), MAX_TRAIN, rng)
    val_pairs = _sample(run.val_loader.pairs.without(run.val_loader.bad.found), MAX_VAL, rng)
    scores = None
    try:
        refiner = new_refiner(train_pairs, run.config)
        plan = read_plan(state, run) or plan_refiner_photos(run, refiner, train_pairs, val_pairs)
        train_pairs, val_pairs = _sample(train_pairs, plan.num_train, rng), _sample(val_pairs, plan.num_val, rng)
        patches = _cut_patches(refiner, train_pairs, run, rng)
        if patches is None:
            log.info("outline refiner: not trained, because the masks of training photos have no outline yet")
        else:
            if not plan.steps:
                plan = plan_refiner_steps(plan, run, refiner, patches)
                if not run.stop_requested:  # a signal cuts the timing short
                    state["refiner_plan"] = asdict(plan)
                    save_checkpoint(path, state)
            train_refiner(refiner, patches, run, plan.steps)
            if run.stop_requested:
                run.interrupted = True
                log.info("interrupted while the outline refiner was trained; the same command trains it")
                return
            scores = score_refiner(refiner.eval(), val_pairs, run)
            log_scores(scores, int(refiner.scale), run.config)
    except DataError as error:  # the network is trained, which is worth more than its refiner
        reason = str(error).rstrip(".")
        log.warning(
            "the outline refiner is not trained: %s; once that is corrected, the same command trains it", reason
        )
        return
    finally:
        run.seconds["outline refiner"] += time.perf_counter() - run.refiner_start
    weights = {key: value.cpu() for key, value in refiner.state_dict().items()}
    state["config"] = {**state["config"], "refiner_steps": run.config.refiner_steps}
    added = {"refiner": weights if scores and scores["used"] else None, "refiner_scores": scores}
    save_checkpoint(path, {**state, **added})


def _sample(pairs: Pairs, count: int, rng: np.random.Generator) -> Pairs:
    chosen = rng.permutation(len(pairs))[:count]
    return pairs.subset(np.sort(chosen).tolist())


def _cut_patches(refiner: Refiner, pairs: Pairs, run: Run, rng: np.random.Generator) -> Patches | None:
    examples = read_examples(pairs, run.model, int(refiner.scale), run.config, run.runtime)
    return cut_patches(examples, len(pairs), refiner, rng)
