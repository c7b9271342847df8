"""fastseg: the shortest way from a folder of photos and a folder of masks to a trained segmentation UNet.

    result = fastseg.train({"num_epochs": 5})      # reads data/train_images, data/train_masks, ...

Names are loaded when first used: importing the package loads neither torch nor DALI nor numba.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseg.config import Config
    from fastseg.data.loader import Loader
    from fastseg.data.pairs import Pairs, find_pairs, split_by_group
    from fastseg.errors import CheckpointError, ConfigError, DataError, FastsegError, OutputError
    from fastseg.masks.evaluate import evaluate
    from fastseg.masks.predict import PredictResult, predict
    from fastseg.masks.submission import decode_rle, encode_rle, write_submission
    from fastseg.network.export import export
    from fastseg.network.segmenter import Segmenter, load
    from fastseg.network.unet import UNet
    from fastseg.quality.check import CheckReport, check
    from fastseg.synthetic.generate import generate
    from fastseg.training.loop import train
    from fastseg.training.summary import TrainResult
    from fastseg.tuning.tune import TuneResult, tune

__version__ = "0.1.0"

_HOME = {
    "train": "training.loop",
    "TrainResult": "training.summary",
    "Config": "config",
    "evaluate": "masks.evaluate",
    "predict": "masks.predict",
    "PredictResult": "masks.predict",
    "Loader": "data.loader",
    "Pairs": "data.pairs",
    "find_pairs": "data.pairs",
    "split_by_group": "data.pairs",
    "check": "quality.check",
    "CheckReport": "quality.check",
    "generate": "synthetic.generate",
    "UNet": "network.unet",
    "load": "network.segmenter",
    "Segmenter": "network.segmenter",
    "export": "network.export",
    "encode_rle": "masks.submission",
    "decode_rle": "masks.submission",
    "write_submission": "masks.submission",
    "tune": "tuning.tune",
    "TuneResult": "tuning.tune",
    "FastsegError": "errors",
    "OutputError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
}

__all__ = [
    "CheckReport",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "FastsegError",
    "Loader",
    "OutputError",
    "Pairs",
    "PredictResult",
    "Segmenter",
    "TrainResult",
    "TuneResult",
    "UNet",
    "check",
    "decode_rle",
    "encode_rle",
    "evaluate",
    "export",
    "find_pairs",
    "generate",
    "load",
    "predict",
    "split_by_group",
    "train",
    "tune",
    "write_submission",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastseg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastseg.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
