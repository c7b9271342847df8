"""Every setting of a run in one frozen, validated object that reads and writes `hyperparams.json`.

    Config(batch_size=32)                       keywords, any case
    Config.from_json("scripts/hyperparams.json")
    config.replace(num_epochs=5).to_json("next.json")

The command line is made from the fields below: a field's description is its help text.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fastseg.errors import ConfigError

__all__ = ["Config", "as_config", "format_value", "closest_match"]

DEFAULT_VAL_DIRS = ("./data/val_images/", "./data/val_masks/")

# pydantic's error types, or how they begin, in our words
RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "value_error": "{error}",
}
REMOVED = ("elastic", "blur")  # fields that earlier checkpoints and config.json files hold; 0 switched them off
MAX_SHOWN = 80  # characters of a wrong value that its error repeats


def _field(default: Any, description: str, **rules: Any) -> Any:
    return Field(default, description=description, **rules)


class Config(BaseModel):
    """Settings of one run; immutable, checked when made.

    Raises:
        ConfigError: one sentence that names the field, the rule, the value found and the remedy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What to learn from
    train_img_dir: str = _field("./data/train_images/", "folder of training images", min_length=1)
    train_mask_dir: str = _field("./data/train_masks/", "folder of training masks", min_length=1)
    val_img_dir: str = _field(DEFAULT_VAL_DIRS[0], "folder of validation images; empty: hold out val_fraction")
    val_mask_dir: str = _field(DEFAULT_VAL_DIRS[1], "folder of validation masks")
    val_fraction: float = _field(0.1, "share of the cars held out where there are no validation folders", gt=0, lt=1)
    image_height: int = _field(160, "height the network sees, in pixels; a multiple of 2**depth", ge=1, le=2**14)
    image_width: int = _field(240, "width the network sees, in pixels; a multiple of 2**depth", ge=1, le=2**14)
    mask_resize: Literal["area", "nearest"] = _field("area", "mask cells: share of foreground, or the pixel at centre")
    bad_samples: Literal["raise", "skip"] = _field("raise", "a file that cannot be used: stop, or name it and go on")
    check_data: bool = _field(True, "look at every file's header before training begins")

    # How to load it
    num_workers: int = _field(0, "decoding threads; 0: one a core", ge=0, le=256)
    pin_memory: bool = _field(True, "pinned staging buffers on a GPU: copies overlap with the training step")
    decoder: Literal["auto", "host", "dali"] = _field("auto", "who decodes: our threads, or a DALI pipeline")
    cache: Literal["auto", "device", "memory", "disk", "off"] = _field("auto", "where decoded pairs stay after epoch 1")
    cache_dir: str = _field("", "folder of the disk cache; empty: the user's cache folder")

    # The network
    base_channels: int = _field(64, "channels at full resolution; they double at each level", ge=1, le=512)
    depth: int = _field(4, "how many times the network halves the image", ge=1, le=8)

    # How to train it
    recipe: Literal["fast", "tutorial"] = _field("fast", "fast: AdamW, one cycle, BCE + Dice; tutorial: Adam and BCE")
    learning_rate: float = _field(1e-4, "start of the cycle (its peak is 30 times this); tutorial: throughout", gt=0)
    weight_decay: float = _field(1e-2, "decoupled weight decay of AdamW", ge=0)
    ema_decay: float = _field(
        0.0, "score and keep a running average of the weights that decays so a step; 0: none", ge=0, lt=1
    )
    progressive_resizing: float = _field(
        0.7, "share of the steps, the first, that see images of half the size", ge=0, le=1
    )
    batch_size: int = _field(16, "pairs a step, over all processes", ge=1)
    num_epochs: int = _field(3, "passes over the training pairs; if not given, as many more as min_steps asks", ge=1)
    min_steps: int = _field(240, "steps a run takes at least when num_epochs is not given", ge=0)
    early_stopping: int = _field(0, "end after this many epochs without a better Dice; 0: never", ge=0)
    time_limit_s: float = _field(0.0, "begin no epoch that would end later than this, in seconds; 0: no limit", ge=0)
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field("auto", "number format of the network's arithmetic")
    compile: Literal["auto", "on", "graphs", "off"] = _field(
        "auto", "torch.compile; auto: if the run is long enough to pay; graphs: CUDA graphs"
    )
    seed: int = _field(0, "decides the order, the augmentation, the split and the first weights", ge=0, lt=2**63)

    # Augmentation; 0 switches each off
    flip: float = _field(0.5, "probability of a left-right flip", ge=0, le=1)
    rotation: float = _field(5.0, "largest rotation, in degrees", ge=0, le=180)
    scale: float = _field(0.1, "largest change of size, as a share", ge=0, lt=1)
    translation: float = _field(0.05, "largest shift, as a share of the size", ge=0, lt=1)
    brightness: float = _field(0.1, "largest change of brightness, as a share of the range", ge=0, le=1)
    contrast: float = _field(0.1, "largest change of contrast, as a share", ge=0, le=1)
    saturation: float = _field(0.1, "largest change of saturation, as a share", ge=0, le=1)
    hue: float = _field(0.02, "largest turn of the hue, as a share of the circle", ge=0, le=0.5)

    # Where it goes, and where it starts
    out_dir: str = _field("runs", "folder of all runs", min_length=1)
    tensorboard: bool = _field(False, "write scalars and overlays for TensorBoard to the run's folder")
    name: str = _field("carvana", "name of this run: results go to out_dir/name")
    load_model: bool = _field(True, "go on from this run's last checkpoint when there is one")
    checkpoint: str = _field("", "weights that a new run starts from, such as another run's best.pt; must exist")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**_known_fields(fields.items()))
        except ValidationError as error:
            raise ConfigError(_one_sentence(error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _value_is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths may be Path objects; true is no number, though Python counts it as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("must be a number")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not hold a NUL character")
        return value

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not name.strip(".") or set(name) & set("/\\"):
            raise ValueError("must be a folder's name, not a path (out_dir takes the path)")
        return name

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", device):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _sizes_can_be_halved(self) -> "Config":
        step = 2**self.depth
        sentences = []
        for field in ("image_height", "image_width"):
            size = getattr(self, field)
            if size % step:
                below, above = size // step * step, (size // step + 1) * step
                choice = f"{below} or {above}" if below else f"{above}"
                sentences.append(
                    f"{field}: must be divisible by {step} (the UNet halves it {self.depth} times); got {size}. "
                    f"Use {choice}."
                )
        if sentences:
            raise ValueError(" ".join(sentences))
        return self

    @model_validator(mode="after")
    def _validation_images_have_masks(self) -> "Config":
        if self.val_img_dir and not self.val_mask_dir:
            raise ValueError(
                f"val_mask_dir: must not be empty, because val_img_dir is {self.val_img_dir}. "
                "Give both, or empty both to hold out val_fraction of the cars."
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run's results."""
        return Path(self.out_dir) / self.name

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed, checked like a new one; fields never set stay unset."""
        return Config(**{**self.model_dump(exclude_unset=True), **_known_fields(changes.items())})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write every field, one a line."""
        Path(path).write_text(json.dumps(self.model_dump(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Config":
        """Read a JSON object whose keys are fields in any case, such as the old project's `hyperparams.json`.

        Raises:
            ConfigError: the file is missing or no JSON object, or a field breaks a rule.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
            fields = json.loads(text, object_pairs_hook=_known_fields)
            if isinstance(fields, dict):
                return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name an existing JSON file.") from None
        except (ValueError, RecursionError) as error:  # json.JSONDecodeError, or bytes that are no text
            raise ConfigError(f"{path}: does not parse as JSON ({error}). Correct the file.") from None
        found = _shorten(json.dumps(fields))
        raise ConfigError(f'{path}: must hold one JSON object; got {found}. Write {{"FIELD": value, ...}}.')


def as_config(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> Config:
    """A `Config` from what `fastseg.train` accepts: itself, a mapping of fields, or the path of a JSON file."""
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config(**{str(key): value for key, value in config.items()})
    if isinstance(config, str | os.PathLike):
        return Config.from_json(config)
    raise ConfigError(
        f"config: must be a Config, a dictionary of fields or the path of a JSON file; got {_shorten(repr(config))}."
    )


def closest_match(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt or abbreviated one is most likely to mean; case and dashes do not count."""
    name, known = name.lower().replace("-", "_"), list(known)
    initials = {"".join(word[:1] for word in field.split("_")): field for field in known}
    return initials.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def format_value(value: Any) -> str:
    """A field's value as one would write it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _known_fields(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in fields:
        name = key.lower()
        if name in REMOVED and not value:
            continue
        if name not in Config.model_fields:
            raise ConfigError(f"{key}: is no known field. Did you mean {closest_match(name, Config.model_fields)}?")
        if name in known:
            raise ConfigError(f"{name}: is given twice (case does not count). Keep one.")
        known[name] = value
    return known


def _one_sentence(error: ValidationError) -> str:
    sentences = []
    for item in error.errors():
        kind = item["type"]
        bounds = {name: format_value(bound) for name, bound in item.get("ctx", {}).items()}
        rule = RULES[kind if kind in RULES else kind.partition("_")[0]].format(**bounds)
        if item["loc"]:
            field = str(item["loc"][0])
            default = format_value(Config.model_fields[field].default)
            rule = f"{field}: {rule}; got {_shorten(repr(item['input']))}. The default is {default}."
        sentences.append(rule)
    return " ".join(sentences)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
