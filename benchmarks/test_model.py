"""Small versions of model.py: `pytest benchmarks/test_model.py --benchmark-enable`."""

import json
import sys
from typing import Any

import flops
import model
import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
PLAIN = model.Variant(4, 1, "fp32", "contiguous")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "MATMUL_SIZE", {"cpu": 256})


@pytest.mark.parametrize("in_channels", [3, 8])
def test_forward_backward(benchmark: Any, in_channels: int) -> None:
    variant = PLAIN._replace(layout="channels_last", in_channels=in_channels)
    network = model.make_model(variant, CPU)
    images, targets = model.make_batch(variant, CPU)
    logits = benchmark(model.train_once, network, images, targets, model.Runtime(CPU, torch.float32))
    exact = model.exact_answer(PLAIN, CPU)
    np.testing.assert_allclose(logits.detach().numpy(), exact.logits, atol=1e-4)


def test_padding_changes_no_result() -> None:
    padded = PLAIN._replace(in_channels=8)
    network, exact = model.make_model(padded, CPU), model.exact_answer(PLAIN, CPU)
    images, targets = model.make_batch(padded, CPU)
    assert images.shape == (1, 8, 160, 240)
    assert not images[:, 3:].any()
    logits = model.train_once(network, images, targets, model.Runtime(CPU, torch.float32))
    error = model.check(padded, logits, model.first_gradient(network), exact)
    assert error["logits_error"] < 1e-5
    assert error["gradient_error"] < 1e-3


def test_a_wrong_variant_is_refused() -> None:
    exact = model.exact_answer(PLAIN, CPU)
    logits, gradient = torch.from_numpy(exact.logits), exact.gradient
    assert model.check(PLAIN, logits, gradient, exact) == {"logits_error": 0, "gradient_error": 0}
    for wrong in ((1.02 * logits, gradient), (logits, -gradient), (logits * torch.nan, gradient)):
        with pytest.raises(ValueError, match="wrong"):
            model.check(PLAIN, *wrong, exact)


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script, in one process."""
    options = ["--channels", "4", "--batch", "1", "--dtypes", "fp32", "--repeat", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["model.py", *options])
    monkeypatch.setattr(model, "in_fresh_process", lambda function, *arguments: function(*arguments))
    model.main()
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["layout"], row["in_channels"]): row for row in last_line["rows"]}
    assert list(rows) == [("contiguous", 3), ("channels_last", 3), ("channels_last", 4), ("channels_last", 8)]
    assert all(0 < row["forward_ms"] < row["forward_backward_ms"] for row in rows.values())
    times = [entry["times_as_long"] for entry in last_line["padding"]]
    plain = rows["channels_last", 3]["forward_backward_ms"]
    assert times == [pytest.approx(rows["channels_last", n]["forward_backward_ms"] / plain, rel=1e-3) for n in (4, 8)]
