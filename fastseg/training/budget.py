"""A run with a time budget: the share of the run that each step completes follows the clock.

A run's position is 0 at its beginning and 1 at its end; learning rate and image size follow it. Without a budget it is
the number of steps over their total. With one, rank 0 decides from the clock, about a hundred times per run, how many
steps are left. The decisions are stored in `last.pt`; between two of them a step depends on nothing but its number, so
that a run that resumes repeats what follows from the last decision exactly.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fastseg.config import Config
from fastseg.durations import format_duration
from fastseg.messages import count_of
from fastseg.runtime.distributed import all_gather
from fastseg.training.recipe import small_share, training_size

if TYPE_CHECKING:
    from fastseg.training.state import Run

__all__ = [
    "Budget",
    "Decision",
    "leave_out_step",
    "open_budget",
    "plan_steps",
    "reserve_seconds",
    "restore_budget",
    "seconds_left",
    "start_clock",
    "used_seconds",
]

FIRST_STEPS = 3  # of an image size, after which the next decision knows how long they take
INTERVAL = 0.01  # of the budget between decisions
KEPT = 0.9  # weight of older steps' seconds after each decision
VALIDATION_COST = 0.5  # of a batch, relative to a training step's, until one has been timed
FIRST_PICTURES_S, PICTURES_S = 2.0, 1.0  # curves and overlay, with and without the import of matplotlib

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """From `step` on, at `position`, `steps` are left; valid until step number `until`."""

    step: int
    position: float
    steps: float  # inf: not known yet, and the position stands still
    until: float

    def position_at(self, step: int) -> float:
        """The position before a step that is not earlier than the decision."""
        return self.position + (1 - self.position) * min((step - self.step) / self.steps, 1)


@dataclass
class Budget:
    """The time of a run, and what has been decided about it."""

    seconds: float
    spent: float = 0.0  # in earlier calls
    decisions: list[Decision] = field(default_factory=lambda: [Decision(0, 0.0, math.inf, 0)])
    timed: dict[int, tuple[float, float]] = field(default_factory=dict)  # pixels of an image: recent seconds, steps
    mark: tuple[float, int] = (0.0, 0)  # seconds and steps of the run, from which the next steps are timed
    refiner_seconds: float | None = None  # reserved for the outline refiner; None: not decided
    former_refiner_seconds: float = 0.0  # which a smaller budget reserved, that is used up

    def position_at(self, step: int) -> float:
        """The position before a step of this call."""
        return self.decisions[-1].position_at(step)

    def step_seconds(self, pixels: int) -> float:
        """Seconds of a step on images of so many pixels, with its share of validation: measured or in proportion."""
        known = pixels if pixels in self.timed else max(self.timed)
        seconds, steps = self.timed[known]
        return seconds / steps * pixels / known

    def state_dict(self, spent: float, step: int) -> dict[str, Any]:
        """What `last.pt` stores, when `spent` seconds are used and `step` steps are done."""
        decisions = [tuple(asdict(decision).values()) for decision in self.decisions]
        return {**vars(self), "spent": spent, "step": step, "decisions": decisions}


def open_budget(config: Config) -> Budget | None:
    """The budget of a new run; None without one."""
    return Budget(config.time_budget) if config.time_budget else None


def restore_budget(budget: Budget, state: dict[str, Any] | None, step: int) -> None:
    """Continue with what an earlier call has left of the budget.

    With another budget than before, the position is moved to the share of it that is spent.

    Args:
        state: of `last.pt`; None: the earlier call had no budget.
        step: that the run resumes at. With another batch size than before it has another number.
    """
    budget.mark = (0.0, step)
    if state is None:
        return
    budget.spent = state["spent"]
    budget.decisions = [Decision(*values) for values in state["decisions"]]
    before = state.get("step", step)
    if before == step:  # else the batches have another size, and steps take another time
        budget.timed = state["timed"]
    if budget.seconds == state["seconds"]:
        budget.refiner_seconds = state.get("refiner_seconds")
        if before == step:
            budget.mark = tuple(state["mark"])
            return
    position = budget.decisions[-1].position_at(before)
    if position >= 1 and budget.seconds > state["seconds"]:
        budget.spent = max(budget.spent, state["seconds"])  # the outline refiner came after the last save
        budget.former_refiner_seconds = state.get("refiner_seconds") or 0.0
    position *= min(state["seconds"] / budget.seconds, 1)
    budget.decisions.append(Decision(step, position, math.inf, step))
    budget.mark = (budget.spent, step)


def start_clock(run: "Run") -> None:
    """Before the first step of a call: its start-up is not time of steps."""
    if run.budget:
        seconds, step = run.budget.mark
        run.budget.mark = (seconds + used_seconds(run) - run.budget.spent, step)


def leave_out_step(budget: Budget, seconds: float) -> None:
    """Do not count the step that has just been taken, such as one that compiles, among those that are timed."""
    budget.mark = (budget.mark[0] + seconds, budget.mark[1] + 1)


def used_seconds(run: "Run") -> float:
    """Seconds of the budget that are used: those of earlier calls and of this one."""
    return (run.budget.spent if run.budget else 0.0) + time.perf_counter() - run.start_time


def reserve_seconds(run: "Run") -> float:
    """Seconds that the end of the run needs after its last step: validation at full size, outline refiner, pictures."""
    config = run.config
    full, budget = config.image_height * config.image_width, run.budget
    if run.history:
        last = run.history[-1]
        validation = last["epoch_seconds"] - last["seconds"]
        validation *= (config.image_height / last["val_size"]) ** 2
    elif budget and budget.timed:
        validation = VALIDATION_COST * budget.step_seconds(full) * len(run.val_loader)
    else:
        validation = 0.0
    refiner = budget.refiner_seconds if budget and config.refiner_steps else None
    return validation + (refiner or 0.0) + (PICTURES_S if run.seconds["pictures"] else FIRST_PICTURES_S)


def seconds_left(run: "Run") -> float:
    """Seconds of the budget that are left before the pictures; inf without a budget."""
    return run.budget.seconds - used_seconds(run) - PICTURES_S if run.budget else math.inf


def plan_steps(run: "Run") -> None:
    """Before a step: decide how many steps are left, if the last decision is no longer valid."""
    budget, step = run.budget, run.steps_done
    if budget is None or step < budget.decisions[-1].until:
        return
    run.loss_sum.item()  # waits for the device: the steps so far are timed
    decision = all_gather(_decide(run, budget, step, used_seconds(run)))[0]
    if budget.decisions[-1].steps == math.inf and decision.steps != math.inf:
        left, steps = budget.seconds - used_seconds(run), count_of(int(decision.steps), "step")
        log.info("time_budget: %s in the %s that are left, so far as is known", steps, format_duration(left))
    elif decision.position > budget.position_at(step) and step == run.first_step:
        left = max(budget.seconds - reserve_seconds(run) - used_seconds(run), 0.0)
        log.info("time_budget: %s are left for the network, too little for a step; raise it", format_duration(left))
    budget.decisions.append(decision)


def _decide(run: "Run", budget: Budget, step: int, now: float) -> Decision:
    position = budget.position_at(step)
    pixels = math.prod(training_size(run.config, position, 1.0))
    before, since = budget.mark
    if step > since:
        size = math.prod(training_size(run.config, budget.position_at(since), 1.0))
        seconds, steps = budget.timed.get(size, (0.0, 0.0))
        budget.timed[size] = KEPT * seconds + max(now - before, 0.0), KEPT * steps + step - since
    budget.mark = now, step
    if not budget.timed:
        return Decision(step, position, math.inf, step + FIRST_STEPS)
    small = max(small_share(run.config) - position, 0.0)
    half, full = (math.prod(training_size(run.config, share, 1.0)) for share in (0.0, 1.0))
    seconds = small * budget.step_seconds(half) + (1 - position - small) * budget.step_seconds(full)
    left = budget.seconds - reserve_seconds(run) - now
    steps = max(round(left * (1 - position) / seconds), 0) if position < 1 else 0
    if not steps:
        return Decision(step, 1.0, math.inf, math.inf)
    until = step + max(round(INTERVAL * budget.seconds / budget.step_seconds(pixels)), 1)
    if pixels not in budget.timed:
        until = step + FIRST_STEPS
    if small:
        until = min(until, step + math.ceil(small / (1 - position) * steps))
    return Decision(step, position, steps, until)
