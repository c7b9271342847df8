"""`predict` with `resume` adds no masks of another network, or with other settings, to a folder of masks."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.masks.sharing.settings import checksum
from tests.conftest import write_checkpoint, write_pair

CPU = {"device": "cpu", "precision": "fp32", "refine": "none", "batch_size": 1}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        write_pair(tmp_path, f"car_{number}", seed=number)
    return tmp_path / "images"


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "first.pt", seed=1)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "second.pt", seed=2)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*_mask.png")}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*_mask.png")}


def stop_after_a_mask(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network ends the command at its third photo, once a mask of another has been written."""
    forward, calls, before = fastseg.UNet.forward, [], times(out)

    def interrupt(network: fastseg.UNet, images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if len(calls) == 3:
            deadline = time.monotonic() + 60
            while times(out) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return forward(network, images)

    monkeypatch.setattr(fastseg.UNet, "forward", interrupt)


@pytest.mark.parametrize("changes", [{"tta": "flip"}, {"refine": "crf"}, {"checkpoint": "second.pt"}])
def test_other_settings_are_refused_before_anything_is_written(photos, first, second, tmp_path, changes):
    fastseg.predict(first, photos, tmp_path / "out", **CPU)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = {"checkpoint": first, **CPU, **changes}
    with pytest.raises(fastseg.ConfigError, match=r"^resume: .*choose another folder for out") as refused:
        fastseg.predict(
            **{**other, "checkpoint": tmp_path / other["checkpoint"]}, images=photos, out=tmp_path / "out", resume=True
        )
    assert all(str(value) in str(refused.value) for value in changes.values())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_weights_under_the_same_name_are_refused(photos, first, second, tmp_path):
    """As after more training of the same run."""
    fastseg.predict(first, photos, tmp_path / "out", **CPU)
    shutil.copy(second, first)
    with pytest.raises(fastseg.ConfigError, match="weights"):
        fastseg.predict(first, photos, tmp_path / "out", resume=True, **CPU)


def test_the_same_weights_resume_from_a_copy_and_with_other_batches(photos, first, tmp_path):
    fastseg.predict(first, photos, tmp_path / "out", **CPU)
    copy = shutil.copy(first, tmp_path / "copy.pt")
    result = fastseg.predict(copy, photos, tmp_path / "out", resume=True, **{**CPU, "batch_size": 3})
    assert (result.masks, result.skipped) == (0, 4)


@pytest.mark.parametrize("other", ["first.pt", "second.pt"])
@pytest.mark.usefixtures("first", "second")
def test_masks_that_an_interrupted_overwriting_has_not_reached_are_made_again(photos, tmp_path, monkeypatch, other):
    """Also those of the same network: the photos may be others."""
    fastseg.predict(tmp_path / other, photos, tmp_path / "expected", **CPU)
    fastseg.predict(tmp_path / "first.pt", photos, tmp_path / "out", **CPU)
    before = times(tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after_a_mask(tmp_path / "out", patch)
        with pytest.raises(KeyboardInterrupt):
            fastseg.predict(tmp_path / other, photos, tmp_path / "out", **CPU)
    written = len(times(tmp_path / "out").items() - before.items())
    assert 0 < written < 4
    result = fastseg.predict(tmp_path / other, photos, tmp_path / "out", resume=True, **CPU)
    assert (result.masks, result.skipped) == (4 - written, written)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("damage", [os.unlink, lambda path: Path(path).write_text("{")])
def test_masks_of_an_older_version_count_as_results(photos, first, tmp_path, damage):
    """Nothing says what they were made with; the next resume does."""
    fastseg.predict(first, photos, tmp_path / "out", **CPU)
    damage(tmp_path / "out/.fastseg.json")
    result = fastseg.predict(first, photos, tmp_path / "out", resume=True, **CPU)
    assert (result.masks, result.skipped) == (0, 4)
    assert json.loads((tmp_path / "out/.fastseg.json").read_text())["checkpoint"] == str(first)


def test_checksums_tell_weights_and_buffers_apart():
    """Also of dtypes that NumPy does not have, and of scalars."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)
    sums = [checksum(network), checksum(network)]
    network[1].running_mean[2] += 1
    sums.append(checksum(network))
    network[1].num_batches_tracked += 1
    sums.append(checksum(network))
    sums.append(checksum(network.to(memory_format=torch.channels_last)))
    assert sums[0] == sums[1]
    assert sums[3] == sums[4]
    assert len(set(sums)) == 3


def test_settings_of_the_training_that_a_prediction_does_not_use_are_not_checked(photos, tmp_path):
    """Graphs need whole batches, of 16 here."""
    path = write_checkpoint(tmp_path / "graphs.pt", compile="graphs", micro_batch=16, batch_size=16)
    result = fastseg.predict(path, photos, tmp_path / "out", **{**CPU, "batch_size": 32})
    assert result.masks == 4
    assert fastseg.evaluate(path, photos, tmp_path / "masks", device="cpu", batch_size=32)["images"] == 4
