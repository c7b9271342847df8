"""fastseg: the shortest way from a folder of photos and a folder of masks to a trained segmentation UNet.

    result = fastseg.train({"num_epochs": 5})      # reads data/train_images, data/train_masks, ...

Names are loaded when first used: importing the package loads neither torch nor DALI nor numba.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseg.config import Config
    from fastseg.data.carvana_like import generate
    from fastseg.data.loader import Loader
    from fastseg.data.pairs import Pairs, find_pairs, split_by_group
    from fastseg.data.quality import CheckReport, check
    from fastseg.errors import CheckpointError, ConfigError, DataError, FastsegError
    from fastseg.evaluation import evaluate
    from fastseg.exporting import export
    from fastseg.prediction import PredictResult, predict
    from fastseg.segmenter import Segmenter, load
    from fastseg.submission import decode_rle, encode_rle, write_submission
    from fastseg.summary import TrainResult
    from fastseg.training import train
    from fastseg.tuning import TuneResult, tune
    from fastseg.unet import UNet

__version__ = "0.1.0"

_HOME = {
    "train": "training",
    "TrainResult": "summary",
    "Config": "config",
    "evaluate": "evaluation",
    "predict": "prediction",
    "PredictResult": "prediction",
    "Loader": "data.loader",
    "Pairs": "data.pairs",
    "find_pairs": "data.pairs",
    "split_by_group": "data.pairs",
    "check": "data.quality",
    "CheckReport": "data.quality",
    "generate": "data.carvana_like",
    "UNet": "unet",
    "load": "segmenter",
    "Segmenter": "segmenter",
    "export": "exporting",
    "encode_rle": "submission",
    "decode_rle": "submission",
    "write_submission": "submission",
    "tune": "tuning",
    "TuneResult": "tuning",
    "FastsegError": "errors",
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
