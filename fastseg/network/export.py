"""Export a trained network as ONNX, as a torch.export program or as safetensors, and verify the file.

    fastseg export --checkpoint runs/carvana/best.pt --out carvana.onnx

ONNX Runtime runs the file without fastseg and without torch:

    import numpy as np, onnxruntime
    from PIL import Image
    session = onnxruntime.InferenceSession("carvana.onnx")
    photo = Image.open("photo.jpg").convert("RGB").reduce(8)  # 1918x1280 to the training size, 240x160
    (probabilities,) = session.run(None, {"images": np.asarray(photo)[None]})
    Image.fromarray(probabilities[0] > 0.5).save("mask.png")

With classes, the probabilities are (B, C, H, W), and `probabilities[0].argmax(0)` is the mask. A checkpoint with an
outline refiner gives a second file, carvana_refiner.onnx: from the photo on a finer grid and these probabilities to the
probabilities on that grid.
"""

import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate

import fastseg
from fastseg.errors import CheckpointError, ConfigError, FastsegError
from fastseg.network.checkpoint import REFINER
from fastseg.network.outline.refiner import OutlineRefiner, load_refiner
from fastseg.network.segmenter import Segmenter, load
from fastseg.runtime.files import atomic_write
from fastseg.runtime.progress import progress_bar

__all__ = ["export"]

FORMATS = {".onnx": "onnx", ".pt2": "torch", ".safetensors": "safetensors"}  # by file extension
TOLERANCE = 1e-4  # largest difference of a probability between file and network, both in float32
BATCH_SIZES = (1, 5)  # of the comparison
MAX_ONNX_BYTES = 2**31 - 2**24  # of weights: a protobuf file is smaller than 2 GiB

log = logging.getLogger(__name__)

Network = Callable[..., Tensor]  # from images to probabilities, like `Segmenter`; or like `OutlineRefiner`


@dataclass(frozen=True)
class _Part:
    """A network to export to one file."""

    module: Segmenter | OutlineRefiner
    make_inputs: Callable[[int], dict[str, Tensor]]  # by name, for a number of images
    refiner: OutlineRefiner | None = None  # in the same file, which only safetensors can hold


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str | None = None,
    *,
    network: nn.Module | None = None,
) -> dict[str, Any]:
    """Export a checkpoint's network, read the file back and compare its probabilities with the network's.

    ONNX and torch files include the preprocessing: they take images (batch, H, W, 3) uint8 RGB at the training size and
    return probabilities (batch, H, W) float32, or (batch, C, H, W) with classes, for any batch size. Each file has the
    version of fastseg and the configuration (`fastseg_version` and `config`, JSON) in its metadata; in a torch file
    these are extra files.

    Args:
        checkpoint: any file that `fastseg.load` reads.
        out: the file to write, atomically and only after the comparison.
        format: onnx; torch, for `torch.export.load(out).module()`; or safetensors, weights for `fastseg.load`. If
            None, it follows from the extension of `out`: .onnx, .pt2 or .safetensors.
        network: as for `fastseg.load`.

    Returns:
        `format`, `bytes`, and `max_difference` between the probabilities of the file and of the network on synthetic
        images; None if ONNX Runtime is not installed. If the checkpoint has an outline refiner, `refiner` has `file`,
        `bytes` and `max_difference` of its own file, `<stem>_refiner` beside `out`; safetensors has both in one.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or too large for the format.
        ConfigError: the format is unknown, or a package that it needs is missing.
        OutputError: `out` cannot be written.
        FastsegError: the installed packages cannot make a file, or its probabilities differ; no file is changed.
    """
    out = Path(out)
    format = _choose_format(out, format)
    if format == "onnx":
        _import_optional("onnx", "onnxscript")
    segmenter = load(checkpoint, network=network)
    size = sum(value.nbytes for value in segmenter.state_dict().values())
    if format == "onnx" and size > MAX_ONNX_BYTES:
        raise CheckpointError(
            f"{checkpoint}: an ONNX file holds less than 2 GiB of weights; the network has {size / 2**30:.1f} GiB. "
            "Export to .pt2 or .safetensors."
        )
    refiner = load_refiner(checkpoint)
    parts = {out: _Part(segmenter, partial(_make_images, segmenter, 1), refiner)}
    second = out.with_name(f"{out.stem}_refiner{out.suffix}")
    if refiner and format != "safetensors":
        parts[second] = _Part(refiner, partial(_make_refiner_inputs, segmenter, refiner))
    with ExitStack() as stack:  # neither file is replaced if the other one cannot be made; `out` is the first
        temporaries = {path: stack.enter_context(atomic_write(path)) for path in reversed(parts)}
        done = [
            _export_part(part, format, temporaries[path], path, network if part.module is segmenter else None)
            for path, part in parts.items()
        ]
    if len(done) > 1:
        done[0]["refiner"] = {"file": second.name, **done[1]}
    elif not refiner and second.exists():
        log.warning(
            "%s: may be the outline refiner of an earlier %s, which has none now; if so, remove it", second, out
        )
    return done[0]


def _export_part(part: _Part, format: str, temporary: Path, out: Path, network: nn.Module | None) -> dict[str, Any]:
    difference = _write(part, format, temporary, out, network)
    return {"format": format, "bytes": temporary.stat().st_size, "max_difference": difference}


def _choose_format(out: Path, format: str | None) -> str:
    if format is None and out.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"out: must end in .onnx, .pt2 or .safetensors; got {out}. Choose such a name, or set format."
        )
    format = format or FORMATS[out.suffix.lower()]
    if format not in FORMATS.values():
        raise ConfigError(f"format: must be onnx, torch or safetensors; got {format!r}. Use one of these.")
    return format


def _write(part: _Part, format: str, temporary: Path, out: Path, network: nn.Module | None) -> float | None:
    """Write `temporary`, which will become `out`, read it back, and return its largest difference in probability."""
    formats: dict[str, tuple[Callable[[_Part], bytes], Callable[[Path], Network | None]]] = {
        "onnx": (_to_onnx, _read_onnx),
        "torch": (_to_torch, _read_torch),
        "safetensors": (_to_safetensors, partial(load, network=network)),
    }
    to_bytes, read = formats[format]
    try:
        with _quiet(), progress_bar() as bar:
            bar.add_task(f"writing {out.name}", total=None, note=format)
            temporary.write_bytes(to_bytes(part))
            written = read(temporary)
            difference = None if written is None else _largest_difference(part, written)
    except (FastsegError, OSError):
        raise
    except Exception as error:  # torch and the onnx packages raise many kinds if their versions do not match
        reason = str(error).strip().partition("\n")[0]
        remedy = "Update them together"
        if network and format != "safetensors":
            remedy = "Change the network's forward so that torch.export can trace it"
        raise FastsegError(
            f"{out}: torch {torch.__version__} and the installed packages cannot export this format "
            f"({type(error).__name__}: {reason}). {remedy}, or export to another format."
        ) from error
    if difference is None:
        log.warning("%s: not compared with the network, because onnxruntime is not installed", out)
    elif not difference <= TOLERANCE:  # NaN must not pass
        raise FastsegError(
            f"{out}: must equal the network's probabilities within {TOLERANCE:g}; they differ by {difference:.1e}, so "
            "the file is not written. Export to another format."
        )
    return difference


def _metadata(part: _Part) -> dict[str, str]:
    """The metadata of every exported file."""
    return {"fastseg_version": fastseg.__version__, "config": json.dumps(part.module.config.model_dump())}


def _to_program(part: _Part) -> torch.export.ExportedProgram:
    inputs = part.make_inputs(2)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        part.module, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
    )
    for node in program.graph.nodes:  # has paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _to_torch(part: _Part) -> bytes:
    file = io.BytesIO()
    torch.export.save(_to_program(part), file, extra_files=_metadata(part))
    return file.getvalue()


def _read_torch(path: Path) -> Network:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _to_onnx(part: _Part) -> bytes:
    onnx, names = _import_optional("onnx", "onnxscript"), list(part.make_inputs(1))
    program = torch.onnx.export(
        _to_program(part),
        input_names=names,
        output_names=["refined" if "probabilities" in names else "probabilities"],
        dynamic_shapes={name: {0: "batch"} for name in names},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, _metadata(part))
    return model.SerializeToString()


def _read_onnx(path: Path) -> Network | None:
    """Check the file, and open it in ONNX Runtime; None if that is not installed."""
    _import_optional("onnx").checker.check_model(os.fspath(path), full_check=True)
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return torch.from_numpy(found)

    return run


def _to_safetensors(part: _Part) -> bytes:
    assert isinstance(part.module, Segmenter)
    refiner = part.refiner.refiner.state_dict() if part.refiner else {}
    weights = part.module.unet.state_dict() | {REFINER + key: value for key, value in refiner.items()}
    # Copies, because the format has neither tensors that share memory nor other orders than rows first.
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    return save(copies, {"format": "pt", **_metadata(part)})


def _make_images(segmenter: Segmenter, scale: int, batch_size: int) -> dict[str, Tensor]:
    """Smooth blobs of colour, `scale` times as large as in training; on noise the network's output hardly varies."""
    config = segmenter.config
    images = 255 * _make_blobs(batch_size, 3, scale * config.image_height, scale * config.image_width)
    return {"images": images.permute(0, 2, 3, 1).to(torch.uint8).contiguous()}


def _make_refiner_inputs(segmenter: Segmenter, refiner: OutlineRefiner, batch_size: int) -> dict[str, Tensor]:
    """Photos, and blobs of foreground or of classes: the network's own on such photos may have no outline."""
    config = segmenter.config
    probabilities = _make_blobs(batch_size, config.num_outputs, config.image_height, config.image_width)
    probabilities = (10 * probabilities).softmax(1) if config.classes else probabilities[:, 0]
    return {**_make_images(segmenter, refiner.scale, batch_size), "probabilities": probabilities}


def _make_blobs(batch_size: int, channels: int, height: int, width: int) -> Tensor:
    """(B, C, H, W) smooth random values in [0, 1]."""
    generator = torch.Generator().manual_seed(batch_size)
    blobs = torch.rand(batch_size, channels, 4, 6, generator=generator)
    return interpolate(blobs, (height, width), mode="bicubic").clamp(0, 1)


def _largest_difference(part: _Part, written: Network) -> float:
    differences = []
    for batch_size in BATCH_SIZES:
        inputs = part.make_inputs(batch_size).values()
        differences.append((written(*inputs) - part.module(*inputs)).abs().max())
    return torch.stack(differences).max().item()


def _import_optional(*names: str) -> Any:
    """Import packages of the extra `export`, all of which must be installed; returns the first."""
    try:
        packages = [importlib.import_module(name) for name in names]
        return packages[0]
    except ImportError:
        raise ConfigError(
            f"format: onnx needs the packages {' and '.join(names)}. Run pip install 'fastseg-dali[export]'."
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the exporter and its packages; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
