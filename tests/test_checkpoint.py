"""Checkpoints of strangers: they neither run code, nor fill the memory, nor end in a traceback."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseg
from fastseg.network.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint
from tests.conftest import ROOT, write_checkpoint
from tests.test_training import config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "best.pt")


LIMITED = """
import resource, sys
import torch
import fastseg
from fastseg.network.checkpoint import load_model
resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))
try:
    load_model(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


def load_with_little_memory(path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


def large_network() -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """The configuration of a network of 32 GB, and the shapes of its weights."""
    settings = fastseg.Config(base_channels=512, depth=5, image_height=32, image_width=32)
    with torch.device("meta"):
        return settings.model_dump(), {key: value.shape for key, value in build_model(settings).state_dict().items()}


def test_weights_are_compared_before_the_network_is_built(tmp_path):
    fields, _ = large_network()
    save_checkpoint(tmp_path / "a.pt", {"config": fields, "model": {"head.weight": torch.zeros(1)}})
    output = load_with_little_memory(tmp_path / "a.pt")
    assert output.startswith("CheckpointError"), output
    assert "weights do not fit" in output


def test_one_value_does_not_stand_for_a_large_weight(tmp_path):
    """Tensors with a stride of 0 have any shape in a file of a few bytes."""
    fields, shapes = large_network()
    save_checkpoint(
        tmp_path / "a.pt", {"config": fields, "model": {k: torch.zeros(()).expand(s) for k, s in shapes.items()}}
    )
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    output = load_with_little_memory(tmp_path / "a.pt")
    assert output.startswith("CheckpointError"), output


def test_compressed_entries_are_refused(checkpoint):
    """A megabyte of deflated pickle may hold a gigabyte."""
    packed = checkpoint.with_name("packed.pt")
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    with pytest.raises(fastseg.CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint(packed)


def test_no_value_lies_beyond_the_file(checkpoint):
    """The pickle claims more values than the entry has; torch would read the memory behind it."""
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["more"] = torch.arange(1e6)
    file = io.BytesIO()
    torch.save(state, file)
    forged = checkpoint.with_name("forged.pt")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(forged, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            target.writestr(entry, data[:40] if len(data) == 4_000_000 else data)
    with pytest.raises(fastseg.CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint(forged)


def test_older_formats_of_torch_are_refused(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state, checkpoint, _use_new_zipfile_serialization=False)
    with pytest.raises(fastseg.CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint(checkpoint)


def test_loading_leaves_torchs_generator_alone(checkpoint):
    before = torch.get_rng_state()
    load_model(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def tamper(*keys: Any, value: Any):
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


TAMPERED = {
    "epoch text": tamper("epoch", value="x"),
    "epoch negative": tamper("epoch", value=-1),
    "epoch true": tamper("epoch", value=True),
    "epoch without history": tamper("epoch", value=5),
    "step beyond": tamper("step", value=99),
    "step none": tamper("step", value=None),
    "history empty": tamper("history", value=[]),
    "history text": tamper("history", value="x"),
    "entry empty": tamper("history", 0, value={}),
    "entry text": tamper("history", 0, "val_dice", value="x"),
    "loader": tamper("loader", value=[1]),
    "loader seed": tamper("loader", "seed", value="x"),
    "loader epoch": tamper("loader", "epoch", value=7),
    "optimizer": tamper("optimizer", value=[1]),
    "optimizer group": tamper("optimizer", "param_groups", 0, "betas", value="x"),
    "optimizer state": tamper("optimizer", "state", 0, "exp_avg", value=torch.zeros(3)),
    "generator": tamper("generator", value=torch.zeros(3)),
    "loss": tamper("loss_sum", value=torch.zeros(2, 3)),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_last_checkpoint_is_refused(change, pairs_dir, tmp_path):
    settings = config(pairs_dir, tmp_path, num_epochs=1)
    last = fastseg.train(settings).run_dir / "last.pt"
    state = torch.load(last, weights_only=True)
    change(state)
    torch.save(state, last)
    with pytest.raises(fastseg.ConfigError, match=r"last\.pt: .*load_model=false"):
        fastseg.train(settings.replace(num_epochs=2))
