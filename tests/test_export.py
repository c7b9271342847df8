"""Exported files, read in processes without fastseg and compared with the network."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import fastseg
from fastseg.cli import main
from fastseg.network import export as exporting
from fastseg.network.checkpoint import load_checkpoint, save_checkpoint
from fastseg.network.outline.refiner import read_refiner, refine_outline
from tests.conftest import write_checkpoint
from tests.outlines import random_refiner

ROOT = Path(__file__).parents[1]
SHAPE = (32, 48, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of best.pt and of its exports."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "best.pt")
    return folder


def run_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def onnx_export(folder):
    """`fastseg export` to ONNX, in a process that prints every warning."""
    command = ["export", "--checkpoint", "best.pt", "--out", "net.onnx"]
    return run_process(folder, "-W", "always", "-m", "fastseg", *command)


@pytest.fixture(scope="module")
def torch_export(folder):
    return fastseg.export(folder / "best.pt", folder / "net.pt2")


def photos(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *SHAPE), dtype=np.uint8)


def eager(folder: Path, images: np.ndarray) -> np.ndarray:
    probabilities = fastseg.load(folder / "best.pt")(torch.from_numpy(images)).numpy()
    assert probabilities.std() > 0.2  # nearly constant outputs would agree in any case
    return probabilities


def test_export_prints_one_line(folder, onnx_export):
    size = (folder / "net.onnx").stat().st_size / 1e6
    assert onnx_export.stdout.startswith(f"net.onnx: onnx, {size:.1f} MB, within ")
    assert onnx_export.stdout.endswith(" of the network\n")
    assert onnx_export.stderr == ""


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_runtime_alone_agrees_with_the_network(folder, onnx_export, batch):
    np.save(folder / "images.npy", photos(batch))
    code = (
        "import sys, numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession('net.onnx', providers=['CPUExecutionProvider'])\n"
        "(probabilities,) = session.run(None, {'images': np.load('images.npy')})\n"
        "np.save('probabilities.npy', probabilities)\n"
        "assert not {'torch', 'fastseg'} & sys.modules.keys()\n"
    )
    run_process(folder, "-c", code)
    probabilities = np.load(folder / "probabilities.npy")
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, eager(folder, photos(batch)), atol=1e-4, rtol=0)


def test_example_in_the_docstring_writes_a_mask(folder, onnx_export):
    """The lines of the docstring, with this network's file name."""
    lines = [line[4:] for line in exporting.__doc__.splitlines() if line.startswith("    ") and "fastseg" not in line]
    code = "\n".join(lines).replace("carvana.onnx", "net.onnx")
    assert len(lines) == 6
    blobs = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    blobs.resize((382, 256)).save(folder / "photo.jpg")
    run_process(folder, "-c", code)
    with Image.open(folder / "mask.png") as image, Image.open(folder / "photo.jpg") as file:
        mask, photo = np.array(image), np.array(file.convert("RGB").reduce(8))
    assert mask.dtype == bool
    probabilities = fastseg.load(folder / "best.pt")(torch.from_numpy(photo[None]))[0].numpy()
    certain = np.abs(probabilities - 0.5) > 1e-4
    assert np.array_equal(mask[certain], (probabilities > 0.5)[certain])
    assert len(np.unique(mask)) == 2


def test_onnx_file_describes_input_output_and_origin(folder, onnx_export):
    model = onnx.load(folder / "net.onnx")
    (images,), (probabilities,) = model.graph.input, model.graph.output
    shapes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (images, probabilities)
    ]
    assert (images.name, images.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert (probabilities.name, probabilities.type.tensor_type.elem_type) == ("probabilities", onnx.TensorProto.FLOAT)
    assert shapes == [["batch", *SHAPE], ["batch", *SHAPE[:2]]]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["fastseg_version"] == fastseg.__version__
    assert fastseg.Config(**json.loads(metadata["config"])) == fastseg.load(folder / "best.pt").config
    assert [path.name for path in folder.iterdir() if path.name.startswith(("net", ".net"))] == ["net.onnx"]


def test_torch_program_needs_only_torch(folder, torch_export):
    assert torch_export["format"] == "torch"
    assert torch_export["bytes"] == (folder / "net.pt2").stat().st_size
    assert torch_export["max_difference"] <= 1e-4
    for batch in (1, 5):
        np.save(folder / f"images{batch}.npy", photos(batch))
    code = (
        "import sys, json, numpy as np, torch\n"
        "metadata = {'config': '', 'fastseg_version': ''}\n"
        "network = torch.export.load('net.pt2', extra_files=metadata).module()\n"
        "for batch in (1, 5):\n"
        "    images = torch.from_numpy(np.load(f'images{batch}.npy'))\n"
        "    np.save(f'probabilities{batch}.npy', network(images).numpy())\n"
        "assert 'fastseg' not in sys.modules\n"
        "print(json.dumps(metadata))\n"
    )
    metadata = json.loads(run_process(folder, "-c", code).stdout)
    for batch in (1, 5):
        probabilities = np.load(folder / f"probabilities{batch}.npy")
        np.testing.assert_allclose(probabilities, eager(folder, photos(batch)), atol=1e-4, rtol=0)
    assert metadata["fastseg_version"] == fastseg.__version__
    assert fastseg.Config(**json.loads(metadata["config"])) == fastseg.load(folder / "best.pt").config


def test_safetensors_hold_the_same_weights_and_load_again(folder):
    exported = fastseg.export(folder / "best.pt", folder / "weights.bin", "safetensors")
    assert exported == {"format": "safetensors", "bytes": (folder / "weights.bin").stat().st_size, "max_difference": 0}
    with safe_open(folder / "weights.bin", framework="np") as file:
        assert file.metadata()["fastseg_version"] == fastseg.__version__
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[key], expected[key].numpy()) for key in weights)
    again = fastseg.load(folder / "weights.bin")
    assert again.config == fastseg.load(folder / "best.pt").config
    assert np.array_equal(again(torch.from_numpy(photos(2))).numpy(), eager(folder, photos(2)))


def test_safetensors_are_scored_and_exported_like_checkpoints(folder, pairs_dir, tmp_path, capsys):
    fastseg.export(folder / "best.pt", tmp_path / "weights.safetensors")
    images, masks = pairs_dir / "images", pairs_dir / "masks"
    scores = [
        fastseg.evaluate(path, images, masks, device="cpu")
        for path in (folder / "best.pt", tmp_path / "weights.safetensors")
    ]
    assert scores[0] == scores[1]
    command = f"export --checkpoint {tmp_path}/weights.safetensors --out {tmp_path}/again.safetensors"
    with pytest.raises(SystemExit, match="0"):
        main(command.split())
    assert capsys.readouterr().out.endswith("MB, identical to the network\n")
    assert fastseg.evaluate(tmp_path / "again.safetensors", images, masks, device="cpu") == scores[0]


def test_files_hold_no_source_lines_of_this_machine(folder, onnx_export, torch_export):
    for name in ("net.onnx", "net.pt2"):
        data = (folder / name).read_bytes()
        assert b"config" in data  # metadata can be searched
        for place in (str(ROOT), os.path.dirname(torch.__file__), "unet.py"):
            assert place.encode() not in data


def test_file_that_differs_is_not_written(folder, tmp_path, monkeypatch):
    out, before = tmp_path / "net.pt2", b"the file before"
    out.write_bytes(before)
    other = fastseg.load(write_checkpoint(tmp_path / "other.pt", seed=1))
    to_torch = exporting._to_torch
    monkeypatch.setattr(exporting, "_to_torch", lambda part: to_torch(replace(part, module=other)))
    with pytest.raises(fastseg.FastsegError, match=r"net\.pt2: .*differ by .*another format"):
        fastseg.export(folder / "best.pt", out)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt2", "other.pt"}


def test_network_of_nan_is_not_written(tmp_path):
    state = torch.load(write_checkpoint(tmp_path / "best.pt"), weights_only=True)
    state["model"]["head.bias"][:] = torch.nan
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(fastseg.FastsegError, match="differ by nan"):
        fastseg.export(tmp_path / "best.pt", tmp_path / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_refusals(folder, tmp_path, cli, monkeypatch):
    """Each refusal names a file or field and leaves no file."""
    best, nowhere = folder / "best.pt", tmp_path / "nowhere" / "net.safetensors"
    for checkpoint, out, format, subject, words in (
        (best, "net.pb", [], "out: ", [".safetensors", "net.pb", "format"]),
        (best, "net.onnx", ["--format", "tflite"], "format: ", ["safetensors", "'tflite'"]),
        (best, nowhere, [], f"{nowhere}: ", ["No such file", "another place"]),
        (tmp_path / "best.pt", tmp_path / "net.onnx", [], f"{tmp_path}/best.pt: ", ["existing checkpoint"]),
    ):
        cli("export", "--checkpoint", checkpoint, "--out", out, *format).assert_refused(subject, *words)
    arguments = ("export", "--checkpoint", best, "--out", tmp_path / "net.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "MAX_ONNX_BYTES", 1000)
        cli(*arguments).assert_refused(f"{best}: ", "2 GiB", ".safetensors")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
        cli(*arguments).assert_refused("format: ", "onnxscript", "fastseg-dali[export]")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_file_is_checked_but_not_compared(folder, onnx_export, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(exporting, "_to_onnx", lambda segmenter: (folder / "net.onnx").read_bytes())
    with caplog.at_level(logging.INFO):
        exported = fastseg.export(folder / "best.pt", tmp_path / "net.onnx")
    assert exported["max_difference"] is None
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/net.onnx: ")
    assert "onnxruntime" in message
    monkeypatch.setattr(exporting, "_to_onnx", lambda segmenter: b"not an ONNX file")
    with pytest.raises(fastseg.FastsegError, match=r"other\.onnx: .*ValidationError.*Update"):
        fastseg.export(folder / "best.pt", tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.fixture(scope="module", params=["two values", "classes"])
def refined(request, tmp_path_factory):
    """The folder of a checkpoint with an outline refiner."""
    folder = tmp_path_factory.mktemp("refined")
    classes = ("a", "b", "c") if request.param == "classes" else ()
    path = write_checkpoint(folder / "best.pt", classes=classes)
    state = load_checkpoint(path)
    if classes:  # each of them occurs
        logits = fastseg.load(path)(grids(8)[0]).log()
        state["model"]["head.bias"] -= logits.mean((0, 2, 3))
    save_checkpoint(path, {**state, "refiner": random_refiner(len(classes) or 1, 2).state_dict()})
    return folder


def grids(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of the network's size, smooth so that they have few outlines, and the same at twice that size."""
    rng = np.random.default_rng(batch)
    blobs = [Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(batch)]
    return tuple(
        torch.from_numpy(np.stack([np.asarray(blob.resize((48 * scale, 32 * scale))) for blob in blobs]))
        for scale in (1, 2)
    )


def test_loaded_refiner_is_that_of_predictions(refined):
    segmenter, refiner = fastseg.load(refined / "best.pt"), fastseg.load_refiner(refined / "best.pt")
    small, large = grids(2)
    probabilities = segmenter(small)
    found = refiner(large, probabilities)
    for i, one in enumerate(probabilities):
        logits = one.log() if one.ndim == 3 else one.logit()[None]
        expected = refine_outline(read_refiner(refined / "best.pt"), logits, large[i], (256, 384))
        expected = expected.softmax(0) if one.ndim == 3 else expected[0].sigmoid()
        assert torch.allclose(found[i], expected, atol=1e-4)
        upsampled = torch.nn.functional.interpolate(logits[None], scale_factor=2.0, mode="bilinear")[0]
        assert (found[i] - (upsampled.softmax(0) if one.ndim == 3 else upsampled[0].sigmoid())).abs().max() > 0.1


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_refiner_is_exported_as_a_second_file(name, refined):
    exported = fastseg.export(refined / "best.pt", refined / name)
    path = refined / exported["refiner"]["file"]
    assert path.name == name.replace("net", "net_refiner")
    assert exported["refiner"]["bytes"] == path.stat().st_size
    assert exported["refiner"]["max_difference"] <= 1e-4
    small, large = grids(3)
    probabilities = fastseg.load(refined / "best.pt")(small)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(["refined"], {"images": large.numpy(), "probabilities": probabilities.numpy()})
    else:
        found = torch.export.load(path).module()(large, probabilities).numpy()
    expected = fastseg.load_refiner(refined / "best.pt")(large, probabilities).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_both_files_are_written_or_none(refined, tmp_path, monkeypatch):
    to_torch = exporting._to_torch
    for name in ("net.pt2", "net_refiner.pt2"):
        (tmp_path / name).write_text("of another network")
    monkeypatch.setattr(exporting, "_to_torch", lambda part: to_torch(part) if part.refiner else 1 / 0)
    with pytest.raises(fastseg.FastsegError, match=r"net_refiner\.pt2: .*ZeroDivisionError"):
        fastseg.export(refined / "best.pt", tmp_path / "net.pt2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("net.pt2", "net_refiner.pt2"), "of another network"
    )


def test_the_refiner_is_compared_at_outlines(refined):
    segmenter, refiner = fastseg.load(refined / "best.pt"), fastseg.load_refiner(refined / "best.pt")
    probabilities = exporting._make_refiner_inputs(segmenter, refiner, 2)["probabilities"]
    assert probabilities.shape == segmenter(grids(2)[0]).shape
    labels = probabilities.argmax(1) if probabilities.ndim == 4 else probabilities > 0.5
    changes = (labels[:, :, 1:] != labels[:, :, :-1]).flatten(1).sum(1)
    assert (changes > 20).all()


def test_safetensors_hold_the_refiner_too(refined):
    assert "refiner" not in fastseg.export(refined / "best.pt", refined / "net.safetensors")
    small, large = grids(1)
    results = []
    for name in ("best.pt", "net.safetensors"):
        probabilities = fastseg.load(refined / name)(small)
        results.append(fastseg.load_refiner(refined / name)(large, probabilities))
    assert torch.equal(*results)


def test_checkpoints_without_a_refiner_have_one_file(folder, torch_export, tmp_path, caplog):
    assert "refiner" not in torch_export
    assert not (folder / "net_refiner.pt2").exists()
    (tmp_path / "net_refiner.pt2").touch()
    fastseg.export(folder / "best.pt", tmp_path / "net.pt2")
    assert "net_refiner.pt2: may be the outline refiner of an earlier" in caplog.text
    assert fastseg.load_refiner(folder / "best.pt") is None


def test_refiner_reports_sizes_that_do_not_fit(refined):
    small, _ = grids(1)
    probabilities = fastseg.load(refined / "best.pt")(small)
    with pytest.raises(ValueError, match=r"uint8 \(B, 64, 96, 3\)"):
        fastseg.load_refiner(refined / "best.pt")(small, probabilities)
