"""All settings of a run in one frozen, validated object that reads and writes JSON files.

    Config(batch_size=32)                       keywords, in any case
    Config.from_json("scripts/hyperparams.json")
    config.replace(num_epochs=5).to_json("next.json")

The command line has a flag for each field below; a field's description is its help text.
"""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fastseg.classes import SegClass, find_ignored, read_class_weights, read_classes
from fastseg.durations import Seconds
from fastseg.errors import ConfigError
from fastseg.messages import closest_match, format_value, shorten, size_message, unique_keys, validation_message

__all__ = ["Config", "as_config", "closest_match", "format_value"]

DEFAULT_VAL_DIRS = ("./data/val_images/", "./data/val_masks/")

REMOVED = ("elastic", "blur", "time_limit_s")  # in older config.json files and checkpoints; ignored if 0
MAX_NAME_BYTES = 255  # of a folder on common file systems

log = logging.getLogger(__name__)


def _field(default: Any, description: str, **rules: Any) -> Any:
    return Field(default, description=description, **rules)


class Config(BaseModel):
    """Settings of one run; immutable, validated on construction.

    Raises:
        ConfigError: a field is unknown or breaks a rule; names the field, the rule, the value and the remedy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Data
    train_img_dir: str = _field("./data/train_images/", "folder of training images", min_length=1)
    train_mask_dir: str = _field("./data/train_masks/", "folder of training masks", min_length=1)
    val_img_dir: str = _field(DEFAULT_VAL_DIRS[0], "folder of validation images; empty: hold out val_fraction")
    val_mask_dir: str = _field(DEFAULT_VAL_DIRS[1], "folder of validation masks")
    val_fraction: float = _field(0.1, "fraction of groups to hold out without validation folders", gt=0, lt=1)
    image_height: int = _field(160, "height of the network's input in pixels", ge=1, le=2**14)
    image_width: int = _field(240, "width of the network's input in pixels", ge=1, le=2**14)
    mask_resize: Literal["area", "nearest"] = _field("area", "resize masks by area average or to the nearest pixel")
    classes: tuple[SegClass, ...] = _field((), "names of classes, or a file of them; empty: the brighter of two values")
    ignore_value: int = _field(255, "with classes: pixels of this value count in nothing; -1: none", ge=-1, le=255)
    bad_samples: Literal["raise", "skip"] = _field("raise", "unusable files: raise an error, or log and skip them")
    check_data: bool = _field(True, "before training, read every image's header and decode every mask")

    # Loading
    num_workers: int = _field(0, "decoding threads; 0: one per core, at most 8 beside a GPU", ge=0, le=256)
    pin_memory: bool = _field(True, "pinned host memory on a GPU: copies overlap with training steps")
    decoder: Literal["auto", "host", "dali"] = _field("auto", "host: decode in threads; dali: in a DALI pipeline")
    cache: Literal["auto", "device", "memory", "disk", "off"] = _field("auto", "where to cache decoded pairs")
    cache_dir: str = _field("", "folder of the disk cache; empty: the user's cache folder")

    # Network
    network: str = _field("unet", "unet; smp:ARCH:ENCODER of segmentation-models-pytorch; own: given in Python")
    base_channels: int = _field(64, "unet: channels at full resolution; they double at each level", ge=1, le=512)
    depth: int = _field(4, "unet: number of times the network halves the image", ge=1, le=8)
    encoder_weights: str = _field("", "smp: pretrained weights of the encoder, such as imagenet; empty: random")
    size_multiple: int = _field(0, "divisor of both image sides; 0: 2**depth for unet, else found by trial", ge=0)

    # Training
    recipe: Literal["fast", "tutorial"] = _field("fast", "fast: Muon or AdamW, one cycle; tutorial: Adam, BCE")
    loss: Literal["auto", "focal", "tversky", "lovasz"] = _field(
        "auto", "classes: auto is cross-entropy + Dice; focal replaces the former, others Dice"
    )
    class_weights: Literal["none", "auto"] | tuple[float, ...] = _field(
        "auto", "auto: rare classes weigh more in the loss; none; or a number for each class"
    )
    learning_rate: float = _field(1e-4, "at the start; the cycle's peak is 30 times this; tutorial: constant", gt=0)
    optimizer: Literal["auto", "muon", "adamw"] = _field("auto", "of recipe fast; auto: Muon for the UNet, else AdamW")
    weight_decay: float = _field(1e-2, "weight decay of AdamW and Muon", ge=0)
    encoder_lr: float = _field(1.0, "factor on the learning rate of the network's encoder", gt=0)
    freeze_encoder: int = _field(0, "freeze the encoder's weights for this many steps at the start", ge=0)
    ema_decay: float = _field(0.0, "decay per step of an average (EMA) of the weights, which is scored", ge=0, lt=1)
    progressive_resizing: float = _field(0.7, "fraction of the run, from its start, at half the image size", ge=0, le=1)
    batch_size: int = _field(0, "pairs per step, all processes; 0: 8 on a CPU, 16 on a GPU or recipe tutorial", ge=0)
    micro_batch: int = _field(0, "pairs per forward pass and process; 0: halve the batch until it fits", ge=0)
    time_budget: Seconds = _field(0.0, "training time: 600 (seconds), 90s, 10m or 1h; 0: train for num_epochs", ge=0)
    num_epochs: int = _field(3, "passes over the training pairs; by default more if min_steps needs them", ge=1)
    min_steps: int = _field(0, "minimum number of steps without num_epochs; 0: 240, and 3840 pairs", ge=0)
    early_stopping: int = _field(0, "stop after this many epochs without a better Dice; 0: never", ge=0)
    checkpoint_every_s: float = _field(60.0, "seconds between saves of last.pt in an epoch; 0: none", ge=0)
    device: str = _field("auto", "auto, cpu, cuda, cuda:N or mps (Apple; never tried)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field("auto", "dtype of the network's arithmetic")
    compile: Literal["auto", "on", "graphs", "off"] = _field(
        "auto", "on: torch.compile; graphs: CUDA graphs; auto: by the device and the run's length"
    )
    refiner_steps: int = _field(1200, "steps that train the outline refiner, after the network; 0: none", ge=0)
    seed: int = _field(0, "seed of order, augmentation, split and initial weights", ge=0, lt=2**63)

    # Augmentation; 0 disables each
    flip: float = _field(0.5, "probability of a left-right flip", ge=0, le=1)
    rotation: float = _field(5.0, "largest rotation, in degrees", ge=0, le=180)
    scale: float = _field(0.1, "largest change of scale, as a fraction", ge=0, lt=1)
    translation: float = _field(0.05, "largest shift, as a fraction of the image size", ge=0, lt=1)
    brightness: float = _field(0.1, "largest change of brightness, as a fraction", ge=0, le=1)
    contrast: float = _field(0.1, "largest change of contrast, as a fraction", ge=0, le=1)
    saturation: float = _field(0.1, "largest change of saturation, as a fraction", ge=0, le=1)
    hue: float = _field(0.02, "largest rotation of hue, as a fraction of a full turn", ge=0, le=0.5)

    # Results and starting point
    out_dir: str = _field("runs", "folder of all runs", min_length=1)
    tensorboard: bool = _field(False, "write TensorBoard scalars and overlays to the run's folder")
    tracker: Literal["", "tensorboard", "mlflow", "wandb"] = _field("", "show the run in an experiment tracker")
    name: str = _field("carvana", "name of the run; results go to out_dir/name")
    load_model: bool = _field(True, "resume from the run's last checkpoint if there is one")
    checkpoint: str = _field("", "initial weights, such as another run's best.pt; a run that resumes ignores it")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**_known_fields(fields.items()))
        except ValidationError as error:
            raise ConfigError(validation_message(error, type(self).model_fields)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _value_is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept Path objects; reject true and false as numbers, which Python accepts as 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("must be a number")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not contain a NUL character")
        return value

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_are_complete(cls, classes: Any) -> Any:
        return read_classes(classes)  # here, so that a checkpoint needs no file of classes

    @field_validator("class_weights", mode="before")
    @classmethod
    def _class_weights_are_numbers(cls, weights: Any) -> Any:
        return weights if weights in ("none", "auto") else read_class_weights(weights)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not name.strip(".") or set(name) & set("/\\"):
            raise ValueError("must be a folder's name, not a path (out_dir takes the path)")
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise ValueError(f"must be at most {MAX_NAME_BYTES} bytes long")
        return name

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", device):
            raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
        return device

    @field_validator("network")
    @classmethod
    def _network_is_known(cls, network: str) -> str:
        if not re.fullmatch(r"unet|smp:\w+:[\w.-]+|own(:.*)?", network):
            raise ValueError(
                "must be unet or smp:ARCH:ENCODER, such as smp:Unet:resnet34 (fastseg.train takes modules)"
            )
        return network

    @model_validator(mode="after")
    def _sizes_can_be_divided(self) -> "Config":
        reason = f"the UNet halves it {self.depth} times" if self.network == "unet" else "the network needs this"
        sides = (("image_height", self.image_height), ("image_width", self.image_width))
        messages = [size_message(field, size, self.cell, reason) for field, size in sides if size % self.cell]
        if messages:
            raise ValueError(" ".join(messages))
        return self

    @model_validator(mode="after")
    def _loss_fits_the_classes(self) -> "Config":
        if self.loss != "auto" and not self.classes:
            raise ValueError(
                f"loss: must be auto for masks of two values, which is BCE + Dice; got {self.loss}. Use auto, or name "
                "the classes."
            )
        if not isinstance(self.class_weights, str) and len(self.class_weights) != len(self.classes):
            raise ValueError(
                f"class_weights: must have one number per class, {len(self.classes)}; got {len(self.class_weights)}. "
                "Use auto, or as many numbers."
            )
        return self

    @model_validator(mode="after")
    def _validation_images_have_masks(self) -> "Config":
        if self.val_img_dir and not self.val_mask_dir:
            raise ValueError(
                f"val_mask_dir: must not be empty, because val_img_dir is {self.val_img_dir}. "
                "Set both, or empty both to hold out val_fraction of the groups."
            )
        return self

    @model_validator(mode="after")
    def _tutorial_has_no_refiner(self) -> "Config":
        if self.recipe == "tutorial" and "refiner_steps" not in self.model_fields_set:
            self.__dict__["refiner_steps"] = 0
        return self

    @model_validator(mode="after")
    def _no_class_is_ignored(self) -> "Config":
        ignored = find_ignored(self.classes, self.ignore_value)
        if ignored and "ignore_value" in self.model_fields_set:
            raise ValueError(
                f"ignore_value: must not stand for a class; got {self.ignore_value}, which is {ignored}. Use -1 if no "
                "pixel is ignored."
            )
        if ignored:
            self.__dict__["ignore_value"] = -1  # the default gives way to a class
        return self

    @model_validator(mode="after")
    def _graphs_take_whole_batches(self) -> "Config":
        if self.compile == "graphs" and 0 < self.micro_batch < self.batch_size:
            raise ValueError(
                f"micro_batch: must be 0 with compile=graphs (a graph has the shape of the whole batch); got "
                f"{self.micro_batch}. Use 0, or compile=auto."
            )
        return self

    @property
    def num_outputs(self) -> int:
        """Logits per pixel: one per class, or a single one that separates two values."""
        return len(self.classes) or 1

    @property
    def cell(self) -> int:
        """Both sides of the network's input are divisible by this; 1 until it is known."""
        return math.lcm(self.size_multiple or 1, 2**self.depth if self.network == "unet" else 1)

    @property
    def run_dir(self) -> Path:
        """The run's folder, `out_dir/name`."""
        return Path(self.out_dir) / self.name

    def replace(self, **changes: Any) -> "Config":
        """A validated copy with some fields changed; fields that were never set stay unset.

        Raises:
            ConfigError: a change breaks a rule.
        """
        return Config(**{**self.model_dump(exclude_unset=True), **_known_fields(changes.items())})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all fields as a JSON object, one per line."""
        Path(path).write_text(json.dumps(self.model_dump(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], **changes: Any) -> "Config":
        """Read a JSON object whose keys are fields, in any case.

        Args:
            changes: fields that replace those of the file.

        Raises:
            ConfigError: the file is missing or not a JSON object, or a field breaks a rule.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
            fields = json.loads(text, object_pairs_hook=unique_keys)
            if isinstance(fields, dict):
                return cls(**{**fields, **changes})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Choose an existing JSON file.") from None
        except (ValueError, RecursionError) as error:  # json.JSONDecodeError, or bytes that are not text
            raise ConfigError(f"{path}: is not valid JSON ({error}). Correct the file.") from None
        found = shorten(json.dumps(fields))
        raise ConfigError(f'{path}: must be one JSON object; got {found}. Write {{"FIELD": value, ...}}.')


def as_config(config: Config | Mapping[str, Any] | str | os.PathLike[str], **changes: Any) -> Config:
    """Convert an argument of `fastseg.train`: a `Config`, a mapping of its fields, or the path of a JSON file.

    `changes` replace its fields.

    Raises:
        ConfigError: it is none of these, or a field breaks a rule.
    """
    if isinstance(config, Config):
        return config.replace(**changes) if changes else config
    if isinstance(config, Mapping):
        return Config(**{**_known_fields((str(key), value) for key, value in config.items()), **changes})
    if isinstance(config, str | os.PathLike):
        return Config.from_json(config, **changes)
    raise ConfigError(
        f"config: must be a Config, a mapping of its fields or the path of a JSON file; got {shorten(repr(config))}."
    )


def _known_fields(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in fields:
        name = key.lower()
        if name in REMOVED and (not value or name == "time_limit_s"):
            if value:
                log.warning("time_limit_s: %s has no effect, because the field is removed. Use time_budget.", value)
            continue
        if name not in Config.model_fields:
            raise ConfigError(f"{key}: unknown field. Did you mean {closest_match(name, Config.model_fields)}?")
        if name in known:
            raise ConfigError(f"{name}: given twice (case is ignored). Keep one.")
        known[name] = value
    return known
