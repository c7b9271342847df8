"""Runs with a time budget, on a clock that the tests set: their end, their decisions, and resume."""

import itertools
import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastseg
from fastseg.data.batch import Batch
from fastseg.durations import format_duration, parse_duration
from fastseg.errors import ConfigError
from fastseg.network.metrics import best_epoch
from fastseg.training import budget as budget_module
from fastseg.training import loop
from fastseg.training.budget import Budget, Decision, restore_budget
from fastseg.training.recipe import training_size
from fastseg.training.step.augment import resize
from fastseg.training.validate import shrink_batches
from tests.processes import run_ranks
from tests.test_resume import send_signal
from tests.test_training import config, same, weights

# A program that trains by a clock which only steps move: 1 s per small step, 4 s per full one, and 1 s per validation.
CLOCK = """
import os, signal, sys
import fastseg
from fastseg.training import budget

def tick(run):
    done = sum(4 if run_size == run.config.image_height else 1 for run_size in sizes(run))
    return done + run.epoch

def sizes(run):
    found, decisions = [], run.budget.decisions
    for step in range(run.steps_done):
        last = [d for d in decisions if d.step <= step][-1]
        found.append(budget.training_size(run.config, last.position_at(step), 1.0)[0])
    return found
"""
exec(compile(CLOCK, "clock", "exec"), clock := {})
SETTINGS = {"time_budget": 60, "progressive_resizing": 0.7, "num_epochs": 1, "batch_size": 4}


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], float]:
    """Replace the clock of the budget."""
    tick = clock["tick"]
    monkeypatch.setattr(budget_module, "used_seconds", tick)
    monkeypatch.setattr("fastseg.training.state.used_seconds", tick)
    monkeypatch.setattr(budget_module, "reserve_seconds", lambda run: 2.0)
    return tick


def last_state(run_dir: Path) -> dict:
    return torch.load(run_dir / "last.pt", weights_only=True)


def used_at_end(state: dict, settings: fastseg.Config) -> float:
    decisions = [Decision(*values) for values in state["budget"]["decisions"]]
    steps = decisions[-1].step
    seconds = 0.0
    for step in range(steps):
        last = [decision for decision in decisions if decision.step <= step][-1]
        height, _ = training_size(settings, last.position_at(step), 1.0)
        seconds += 4 if height == settings.image_height else 1
    return seconds + state["epoch"]


@pytest.mark.parametrize("seconds", [20, 60, 200])
def test_run_ends_with_its_budget(pairs_dir, tmp_path, fake_clock, seconds):
    settings = config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": seconds})
    result = fastseg.train(settings)
    state = last_state(result.run_dir)
    used = state["budget"]["spent"] + 2  # of the reserve
    assert abs(used - seconds) <= max(0.03 * seconds, 4)  # a full step takes 4
    rates = [entry["learning_rate"] for entry in result.history]
    assert seconds == 20 or rates[-1] < 0.2 * max(rates)  # 20 s are seven steps
    heights = [entry["val_size"] for entry in result.history]
    assert heights == sorted(heights)
    assert heights[-1] == settings.image_height
    assert result.history[result.best_epoch - 1]["val_size"] == settings.image_height


def test_share_of_full_size_steps_is_that_of_a_run_without_a_budget(pairs_dir, tmp_path, fake_clock):
    settings = config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 300})
    state = last_state(fastseg.train(settings).run_dir)
    decisions = [Decision(*values) for values in state["budget"]["decisions"]]
    positions = []
    for step in range(decisions[-1].step):
        positions.append([d for d in decisions if d.step <= step][-1].position_at(step))
    assert positions == sorted(positions)
    small = sum(position < 0.7 for position in positions)
    assert small / len(positions) == pytest.approx(0.7, abs=0.06)


@pytest.mark.parametrize("batch", [1, 2, 5, 9, 17])
def test_resume_equals_uninterrupted(pairs_dir, tmp_path, fake_clock, monkeypatch, batch):
    whole = fastseg.train(config(pairs_dir, tmp_path, name="whole", **SETTINGS))
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, batch)
        stopped = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **SETTINGS))
    assert stopped.interrupted
    resumed = fastseg.train(config(pairs_dir, tmp_path, name="stopped", **SETTINGS))
    states = [last_state(run.run_dir) for run in (whole, resumed)]
    assert states[0]["budget"]["decisions"] == states[1]["budget"]["decisions"]
    assert same(states[0]["model"], states[1]["model"])
    assert [entry["train_loss"] for entry in whole.history] == [entry["train_loss"] for entry in resumed.history]


def test_steps_until_the_next_decision_do_not_depend_on_the_clock(pairs_dir, tmp_path, fake_clock, monkeypatch):
    """A run resumed on a machine ten times as slow repeats the steps that were decided before."""
    settings = config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 100, "batch_size": 1})
    monkeypatch.setattr(budget_module, "INTERVAL", 0.06)
    seen: dict[str, dict[int, float]] = {"whole": {}, "slow": {}}
    take_step = loop.train_step

    def record(run, images, masks):
        seen[run.config.name][run.steps_done] = run.budget.position_at(run.steps_done)
        take_step(run, images, masks)

    monkeypatch.setattr(loop, "train_step", record)
    fastseg.train(settings.replace(name="whole"))
    with monkeypatch.context() as patch:
        send_signal(patch, signal.SIGINT, 10)
        slow = fastseg.train(settings.replace(name="slow"))
    decision = Decision(*last_state(slow.run_dir)["budget"]["decisions"][-1])
    assert decision.step <= 10 < decision.until - 1
    monkeypatch.setattr(budget_module, "used_seconds", lambda run: 10 * clock["tick"](run))
    fastseg.train(settings.replace(name="slow"))
    for step in range(int(decision.until)):
        assert seen["slow"][step] == seen["whole"][step]
    assert max(seen["slow"]) < max(seen["whole"])


def test_finished_run_continues_with_a_larger_budget(pairs_dir, tmp_path, fake_clock, caplog):
    first = fastseg.train(config(pairs_dir, tmp_path, **SETTINGS))
    caplog.set_level("INFO")
    again = fastseg.train(config(pairs_dir, tmp_path, **SETTINGS))
    assert "raise time_budget" in caplog.text
    assert len(again.history) == len(first.history)
    more = fastseg.train(config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 120}))
    assert len(more.history) > len(first.history)
    assert last_state(more.run_dir)["budget"]["decisions"][-1][0] > last_state(first.run_dir)["epoch"]


def saved_budget() -> dict:
    """A quarter of a budget of 100 s is done: the state that `last.pt` would have."""
    decisions = [Decision(0, 0.0, math.inf, 3), Decision(10, 0.1, 90.0, 50)]
    timed = {38400: (9.0, 9.0)}
    return Budget(seconds=100.0, decisions=decisions, mark=(10.0, 10), timed=timed).state_dict(25.0, 25)


def test_a_run_that_resumes_unchanged_keeps_its_decisions():
    budget = Budget(100.0)
    restore_budget(budget, saved_budget(), 25)
    assert budget.position_at(25) == pytest.approx(0.25)
    assert (budget.decisions[-1].step, budget.mark, budget.spent) == (10, (10.0, 10), 25.0)


@pytest.mark.parametrize(("seconds", "step", "position"), [(100.0, 50, 0.25), (100.0, 13, 0.25), (200.0, 25, 0.125)])
def test_another_batch_size_or_budget_asks_for_a_decision_at_once(seconds, step, position):
    """With another batch size the same place in the run has another number of steps."""
    budget = Budget(seconds)
    restore_budget(budget, saved_budget(), step)
    assert budget.position_at(step) == pytest.approx(position)
    assert (budget.decisions[-1].until, budget.mark) == (step, (25.0, step))
    assert bool(budget.timed) == (step == 25)  # steps of other batches take another time


def test_a_finished_run_has_used_its_budget():
    """What came after the last save, the outline refiner and the pictures, is not counted in it."""
    state = {**saved_budget(), "decisions": [(0, 0.0, math.inf, 3), (25, 1.0, math.inf, math.inf)]}
    state["refiner_seconds"] = 30.0
    budget = Budget(200.0)
    restore_budget(budget, {**state, "spent": 65.0}, 25)
    assert (budget.spent, budget.position_at(25), budget.mark) == (100.0, 0.5, (100.0, 25))
    assert (budget.refiner_seconds, budget.former_refiner_seconds) == (None, 30.0)


@pytest.mark.parametrize("seconds", [50.0, 200.0])
def test_an_unfinished_run_with_another_budget_decides_again_what_the_refiner_gets(seconds):
    budget = Budget(seconds)
    restore_budget(budget, {**saved_budget(), "refiner_seconds": 30.0}, 25)
    assert (budget.spent, budget.former_refiner_seconds) == (25.0, 0.0)


def test_a_budget_that_is_hardly_larger_trains_no_longer(pairs_dir, tmp_path, fake_clock, caplog):
    first = fastseg.train(config(pairs_dir, tmp_path, **SETTINGS))
    caplog.set_level("INFO")
    again = fastseg.train(config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 60.5}))
    assert re.search(r"time_budget: [0-2] s are left for the network, too little for a step; raise it", caplog.text)
    assert len(again.history) == len(first.history)


def test_steps_of_a_run_without_a_budget_are_not_timed(pairs_dir, tmp_path, fake_clock):
    before = fastseg.train(config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 0, "num_epochs": 3}))
    steps = 3 * 8 // 4
    assert len(before.history) == 3
    after = fastseg.train(config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 100}))
    first, second, *_ = [Decision(*values) for values in last_state(after.run_dir)["budget"]["decisions"][1:]]
    assert first == Decision(steps, 0.0, math.inf, steps + 3)  # three steps are taken to time them
    assert (second.step, second.position) == (steps + 3, 0.0)
    assert after.history[-1]["learning_rate"] < 0.2 * max(entry["learning_rate"] for entry in after.history)


def test_start_up_and_compiling_are_not_time_of_steps(monkeypatch):
    run = make_run()
    monkeypatch.setattr(budget_module, "used_seconds", lambda run: 40.0)
    run.budget.spent, run.budget.mark = 25.0, (20.0, 8)  # 5 s and some steps since the last decision
    budget_module.start_clock(run)
    assert run.budget.mark == (35.0, 8)
    budget_module.leave_out_step(run.budget, 26.0)
    assert run.budget.mark == (61.0, 9)


def test_a_budget_that_is_too_short_takes_a_step(pairs_dir, tmp_path, fake_clock):
    result = fastseg.train(config(pairs_dir, tmp_path, **{**SETTINGS, "time_budget": 0.001}))
    assert len(result.history) <= 2  # three steps, after which it is known how long they take
    assert result.history[-1]["val_size"] == 32
    assert math.isfinite(result.val_dice)


def make_run(**changes):
    """Only what a decision reads."""
    from types import SimpleNamespace

    settings = fastseg.Config(time_budget=100, image_height=160, image_width=240)
    values = {"config": settings, "budget": Budget(100.0), "history": [], "seconds": {"pictures": 1.0}}
    values |= {"steps_done": 0, "step": 0, "val_loader": [1] * 4, "start_time": 0.0}
    return SimpleNamespace(**{**values, **changes})


def test_decision_gives_the_steps_that_fit_in_the_time():
    run = make_run(steps_done=10, step=10)
    small, full = 80 * 128, 160 * 240
    height, width = training_size(run.config, 0.0, 1.0)
    small = height * width
    run.budget.timed = {small: (1.0, 1.0), full: (4.0, 1.0)}
    run.budget.mark = (10.0, 10)
    decision = budget_module._decide(run, run.budget, 10, 10.0)
    reserve = budget_module.reserve_seconds(run)
    steps = (90 - reserve) / (0.7 * 1 + 0.3 * 4)
    assert decision.steps == round(steps)
    assert decision.position == 0
    assert decision.position_at(10 + round(steps)) == 1


def test_reserve_scales_the_last_validation_to_full_size():
    entry = {"epoch_seconds": 7.0, "seconds": 5.0, "val_size": 80}
    run = make_run(history=[entry])
    assert budget_module.reserve_seconds(run) == pytest.approx(2.0 * 4 + budget_module.PICTURES_S)
    run.budget.refiner_seconds = 20.0
    assert budget_module.reserve_seconds(run) == pytest.approx(2.0 * 4 + 20 + budget_module.PICTURES_S)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("600", 600), ("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("0.5h", 1800), (45, 45), (0, 0)],
)
def test_durations(text, seconds):
    assert fastseg.Config(time_budget=text).time_budget == seconds
    assert float(parse_duration(text)) == seconds


@pytest.mark.parametrize("text", ["10 minutes", "10x", "m", "-5", "", "1d", "ten", "nan", "inf", "m10", True])
def test_wrong_durations_are_refused(text):
    with pytest.raises(ConfigError, match=r"time_budget: must be"):
        fastseg.Config(time_budget=text)


def test_format_of_durations():
    assert [format_duration(seconds) for seconds in (0, 45, 150, 3900)] == ["0 s", "45 s", "2 min 30 s", "1 h 5 min"]


def test_command_line_reads_a_duration(pairs_dir, tmp_path, cli):
    from tests.conftest import flags

    settings = config(pairs_dir, tmp_path, **SETTINGS).model_dump(exclude_unset=True)
    done = cli("train", *flags({**settings, "time_budget": "3s"}))
    assert done.status == 0, done.err
    saved = json.loads((tmp_path / "carvana" / "config.json").read_text())
    assert saved["time_budget"] == 3
    cli("train", "--time-budget", "soon").assert_refused("time_budget", "must be", "10m", "soon")


def test_removed_time_limit_is_still_read(caplog):
    assert fastseg.Config(time_limit_s=0.0) == fastseg.Config()
    assert not caplog.text
    assert fastseg.Config(TIME_LIMIT_S=60.0) == fastseg.Config()
    assert "time_limit_s" in caplog.text
    assert "time_budget" in caplog.text


PROGRAM = (
    CLOCK
    + """
from fastseg.training import state
budget.used_seconds = state.used_seconds = tick
budget.reserve_seconds = lambda run: 2.0
settings = fastseg.Config.from_json(sys.argv[1])
kill = lambda entry: len(sys.argv) > 2 and entry["epoch"] == int(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    fastseg.train(settings, after_epoch=kill)
"""
)


def run_program(settings: fastseg.Config, folder: Path, *arguments: object, ranks: int = 1) -> int:
    settings.to_json(folder / "settings.json")
    return run_ranks(ranks, "-c", PROGRAM, folder / "settings.json", *arguments).returncode


def test_kill_nine_does_not_change_the_result(pairs_dir, tmp_path):
    settings = config(pairs_dir, tmp_path, **SETTINGS)
    assert run_program(settings.replace(name="whole"), tmp_path) == 0
    assert run_program(settings.replace(name="killed"), tmp_path, 2) == -signal.SIGKILL
    assert run_program(settings.replace(name="killed"), tmp_path) == 0
    whole, killed = (weights(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert same(whole, killed)


def test_two_ranks_decide_alike(pairs_dir, tmp_path):
    """Both take rank 0's decisions, and together they compute what one process does."""
    settings = config(pairs_dir, tmp_path, **SETTINGS)
    assert run_program(settings.replace(name="one"), tmp_path) == 0
    assert run_program(settings.replace(name="two"), tmp_path, ranks=2) == 0
    one, two = (last_state(tmp_path / name) for name in ("one", "two"))
    assert one["budget"]["decisions"] == two["budget"]["decisions"]
    losses = [[entry["train_loss"] for entry in state["history"]] for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_numbers_of_steps_come_once() -> None:
    decision = Decision(10, 0.5, 20, 15)
    positions = [decision.position_at(step) for step in range(10, 31)]
    assert positions[0] == 0.5
    assert positions[-1] == 1
    assert all(b - a == pytest.approx(0.025) for a, b in itertools.pairwise(positions))
    assert Decision(3, 0.2, math.inf, 6).position_at(5) == 0.2


@pytest.mark.parametrize("classes", [False, True])
def test_validation_shrinks_images_as_training_does(classes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 3, (2, 16, 24), dtype=torch.uint8, generator=generator)
    batch = Batch(images, masks, np.arange(2))
    assert next(shrink_batches([batch], 16, 24, classes=classes)) is batch
    small = next(shrink_batches([batch], 8, 12, classes=classes))
    expected, targets = resize(
        images.permute(0, 3, 1, 2).float(), masks[:, None] if classes else masks[:, None].float(), 8, 12
    )
    assert small.images.dtype == small.masks.dtype == torch.uint8
    torch.testing.assert_close(small.images.permute(0, 3, 1, 2).float(), expected, atol=0.51, rtol=0)
    torch.testing.assert_close(small.masks[:, None].float(), targets.float(), atol=0.51, rtol=0)


def test_best_epoch_is_one_at_full_size():
    history = [{"val_size": 16, "val_dice": 0.9}, {"val_size": 32, "val_dice": 0.5}, {"val_size": 32, "val_dice": 0.6}]
    assert best_epoch(history) is history[2]
    assert best_epoch(history[:1]) is history[0]
    assert best_epoch([{"val_dice": 0.4}, {"val_dice": 0.7}])["val_dice"] == 0.7  # of older versions
