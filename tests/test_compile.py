"""torch.compile and CUDA graphs: when they are used, and that they equal the eager network."""

import os
from contextlib import nullcontext

import pytest
import torch

import fastseg
from fastseg.runtime.device import Runtime, choose_runtime
from fastseg.training.compile import capture_graphs, decide_compile
from tests.test_training import config, weights


@pytest.mark.skipif(os.environ.get("CC", "g++") == "", reason="needs a C++ compiler")
def test_compiled_training_reaches_the_same_loss(pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that what training sets is undone
    settings = config(pairs_dir, tmp_path, name="compiled", precision="fp32", compile="on", progressive_resizing=0.5)
    eager = fastseg.train(settings.replace(name="eager", compile="off"))
    compiled = fastseg.train(settings)
    losses = [[entry["train_loss"] for entry in run.history] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not any("_orig_mod" in key for key in weights(compiled.run_dir / "last.pt"))
    assert list((tmp_path / "cache/fastseg/compiled").glob("*/fxgraph/*"))  # for the next run


@pytest.mark.parametrize(
    ("device", "steps", "warm", "choice"),
    [("cpu", 10**6, True, "off"), ("cuda", 954, False, "off"), ("cuda", 954, True, "on"), ("cuda", 9540, False, "on")],
)
def test_compile_auto_weighs_the_steps_that_remain(device, steps, warm, choice):
    chosen, reason = decide_compile(fastseg.Config(), torch.device(device), steps, warm=warm)
    assert chosen == choice
    assert device == "cpu" or str(steps) in reason
    for asked in ("off", "graphs"):
        assert decide_compile(fastseg.Config(compile=asked), torch.device(device), steps, warm=warm)[0] == asked


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
