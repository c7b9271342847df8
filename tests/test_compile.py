"""torch.compile and CUDA graphs: when they are used, and that they equal the eager network."""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastseg
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.training.budget import Budget, Decision
from fastseg.training.recipe import training_size
from fastseg.training.state import Run
from fastseg.training.step import compile
from fastseg.training.step.compile import (
    capture_graphs,
    choose_compile,
    compile_if_it_pays,
    compile_model,
    seconds_of_steps,
)
from tests.test_training import config, weights


@pytest.mark.skipif(os.environ.get("CC", "g++") == "", reason="needs a C++ compiler")
def test_compiled_training_reaches_the_same_loss(pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that what training sets is undone
    settings = config(
        pairs_dir, tmp_path, name="compiled", precision="fp32", compile="on", progressive_resizing=0, depth=1
    )
    eager = fastseg.train(settings.replace(name="eager", compile="off"))
    from torch._inductor import config as inductor

    # inductor would compile three programs, to ask the compiler for the instructions that /proc/cpuinfo names.
    with inductor.patch({"cpp.vec_isa_ok": True}):
        compiled = fastseg.train(settings)
    losses = [[entry["train_loss"] for entry in run.history] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not any("_orig_mod" in key for key in weights(compiled.run_dir / "last.pt"))
    assert list((tmp_path / "cache/fastseg/compiled").glob("*/fxgraph/*"))  # for the next run


@pytest.mark.parametrize(
    ("device", "world_size", "micro_batch", "choice"),
    [("cpu", 1, 0, "off"), ("cuda", 1, 0, "graphs"), ("cuda", 2, 0, "off"), ("cuda", 1, 4, "off")],
)
def test_compile_auto_captures_graphs_where_it_can(device, world_size, micro_batch, choice):
    runtime = Runtime(torch.device(device), torch.float32, world_size=world_size)
    settings = fastseg.Config(micro_batch=micro_batch)
    assert choose_compile(settings, runtime)[0] == choice
    assert choose_compile(settings.replace(compile="on"), runtime) == ("on", "as asked")


class PartOfRun(SimpleNamespace):
    """Some attributes of a run, and the methods that need no others."""

    budget = None
    epoch = 0
    position_at, size_of, last_size, is_finished = Run.position_at, Run.size_of, Run.last_size, Run.is_finished


def make_run(steps_s, *, num_epochs=10, time_budget=0, **changes):
    """A run on a GPU after the first of `num_epochs` epochs of 100 steps, which took `steps_s` seconds."""
    return PartOfRun(
        config=fastseg.Config(num_epochs=num_epochs, progressive_resizing=0.5, **changes),
        runtime=Runtime(torch.device("cuda"), torch.float32),
        total_steps=100 * num_epochs,
        steps_done=100,
        first_step=0,
        seconds={"steps": steps_s, "pictures": 0.0},
        history=[],
        compiled="graphs",
        start_time=time.perf_counter(),
        budget=Budget(time_budget, decisions=[Decision(100, 0.1, 900, 1000)]) if time_budget else None,
    )


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (100, 1000), (450, 550), (600, 700), (100, 100)])
def test_the_time_of_steps_follows_their_pixels(start, stop):
    run = make_run(2.0)
    sizes = [training_size(run.config, step, run.total_steps) for step in range(1000)]
    expected = sum(0.02 * math.prod(size) / math.prod(sizes[0]) for size in sizes[start:stop])
    assert seconds_of_steps(run, start, stop) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps_s", "cached", "changes", "compiles"),
    [
        (1, False, {}, False),  # about 25 s remain, of which compiling saves 5
        (4, False, {}, False),  # about 100 s, 20 s: less than it takes to compile two sizes
        (4.5, True, {}, True),
        (30, False, {}, True),
        (30, False, {"compile": "graphs"}, False),
        (30, False, {"time_budget": 60}, False),
        (30, False, {"time_budget": 600}, True),
        (30, False, {"time_budget": 600, "reserved": 400}, False),
        (30, False, {"world_size": 2}, False),
        (30, False, {"compilers": False}, False),
    ],
)
def test_a_run_compiles_after_an_epoch_if_that_saves_time(steps_s, cached, changes, compiles, tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "USERS_INDUCTOR_CACHE", str(tmp_path))
    changes = {"reserved": None, "world_size": 1, "compilers": True, **changes}
    reserved, world_size, compilers = (changes.pop(name) for name in ("reserved", "world_size", "compilers"))
    monkeypatch.setattr(compile, "_has_compilers", lambda: compilers)
    if cached:
        (tmp_path / "fxgraph/code").mkdir(parents=True)
    monkeypatch.setattr(compile, "_compile", lambda run: None)
    run = make_run(steps_s, **changes)
    run.runtime = replace(run.runtime, world_size=world_size)
    if run.budget:
        run.budget.refiner_seconds = reserved
    compile_if_it_pays(run)
    assert run.compiled == ("on" if compiles else "graphs")


def test_a_call_that_has_only_scored_an_epoch_does_not_compile(tmp_path):
    """It has no step of its own whose time it knows."""
    settings = fastseg.Config(device="cpu", compile="auto")
    device = SimpleNamespace(type="cuda")
    run = SimpleNamespace(config=settings, compiled="graphs", runtime=SimpleNamespace(device=device))
    run.steps_done = run.first_step = 7
    compile_if_it_pays(run)
    assert run.compiled == "graphs"


@pytest.mark.parametrize(("choice", "compiled"), [("auto", "off"), ("graphs", None)])
def test_graphs_that_do_not_fit_in_memory(monkeypatch, choice, compiled):
    """`auto` goes on without them, and can then split the batch; `graphs` is refused."""

    def capture(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(compile, "capture_graphs", capture)
    monkeypatch.setattr(compile, "choose_compile", lambda config, runtime: ("graphs", "for the test"))
    run = PartOfRun(
        config=fastseg.Config(compile=choice), steps_done=0, total_steps=4, model=None, runtime=None, compiled="off"
    )
    with nullcontext() if compiled else pytest.raises(torch.OutOfMemoryError):
        compile_model(run)
    assert run.compiled == "off"


def test_graphs_are_refused_without_a_gpu(tmp_path):
    with pytest.raises(fastseg.ConfigError, match=r"^compile: .*GPU.*cpu.*auto"):
        fastseg.train(config(tmp_path / "nowhere", tmp_path, compile="graphs"))
    assert not any(tmp_path.iterdir())
    choose_runtime(config(tmp_path, tmp_path, compile="graphs"))  # scoring is possible on any machine


def test_captured_graphs_equal_the_network_at_every_shape(monkeypatch):
    """Capturing needs a GPU. Here a fake runs the network three times, as capturing does, and returns it."""

    def make_graphed_callables(module, inputs):
        for _ in range(3):
            module(*inputs)
        shapes.append(inputs[0].shape)
        return module

    shapes = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    torch.manual_seed(0)
    model, plain = (fastseg.UNet(4, 2) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    both = [(2, 3, 8, 12), (2, 3, 16, 24)]
    forward = capture_graphs(model, Runtime(torch.device("cpu"), torch.float32), both)
    assert shapes == both
    for shape in both:
        x = torch.randn(shape)
        found, exact = forward(x), plain.train()(x)
        torch.testing.assert_close(found, exact)
        found.mean().backward()
        exact.mean().backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    with pytest.raises(KeyError):
        forward(torch.randn(1, 3, 8, 12))
