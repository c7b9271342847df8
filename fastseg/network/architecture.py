"""The network that a configuration names: fastseg's UNet, one of segmentation-models-pytorch, or a user's own.

    network="unet"                     base_channels and depth decide its size
    network="smp:Unet:resnet34"        any architecture and encoder of segmentation-models-pytorch
    fastseg.train(config, network=module)

A checkpoint names its network in its configuration. Only the first two kinds are built from that; a module of a user's
own program is "own:" and its class, which says what is missing and is never imported.
"""

import copy
import importlib
import logging
import math
from typing import Any

from torch import nn

from fastseg.config import Config
from fastseg.errors import ConfigError
from fastseg.network.adapter import Adapter, find_size_multiple
from fastseg.network.unet import UNet

__all__ = ["build_model", "check_encoder", "encoder_parameters", "is_own", "name_network", "resolve_sizes"]

FASTSEG_MEAN, FASTSEG_STD = (0.5,) * 3, (0.25,) * 3  # of fastseg's normalisation, which random weights keep
MAX_SHOWN = 300  # characters of another package's message

log = logging.getLogger(__name__)


def is_own(config: Config) -> bool:
    """Whether the network is a module of a user's own program."""
    return config.network.startswith("own")


def name_network(network: nn.Module | None) -> dict[str, Any]:
    """The fields of `Config` that record a user's own network; none without one.

    Raises:
        ConfigError: it is not a module.
    """
    if network is None:
        return {}
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"network: must be a torch.nn.Module; got {type(network).__name__}. Pass an instance of a module."
        )
    return {"network": f"own:{type(network).__module__}.{type(network).__qualname__}"}


def build_model(config: Config, network: nn.Module | None = None, *, pretrained: bool = False) -> nn.Module:
    """A new network, as configured.

    Args:
        network: a user's own; it is copied and keeps its weights. The others have random weights.
        pretrained: load `config.encoder_weights` of an smp network.

    Returns:
        From normalised images (B, 3, H, W) to logits (B, num_outputs, H, W).

    Raises:
        ConfigError: the network is a user's own and is not given; or its package is missing, or knows no such
            architecture, encoder or weights; or the weights cannot be downloaded.
    """
    if network is not None:
        return Adapter(copy.deepcopy(network))
    if is_own(config):
        raise ConfigError(
            f"network: {config.network} is a module of your own program, which fastseg does not import. Pass an "
            "instance of it: network=MODULE."
        )
    if config.network == "unet":
        return UNet(config.base_channels, config.depth, out_channels=config.num_outputs)
    return _build_smp(config, config.encoder_weights if pretrained else "")


def resolve_sizes(config: Config, model: nn.Module) -> Config:
    """Fit a configuration to the image sizes that its network takes; the UNet's follow from its depth.

    Raises:
        ConfigError: the network does not take the configured size, or its output has the wrong shape.
    """
    if config.network == "unet":
        return config
    network = model.network if isinstance(model, Adapter) else model
    found = find_size_multiple(network, config.image_height, config.image_width, config.num_outputs)
    if found == 0 and config.progressive_resizing:
        log.info("progressive_resizing: 0, because the network takes images of one size only")
        config = config.replace(progressive_resizing=0.0)
    return config.replace(size_multiple=math.lcm(found, config.size_multiple or 1))


def encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that `encoder_lr` and `freeze_encoder` are about; empty if the network has no such part.

    In the UNet these are the levels on the way down and the innermost one, in other networks those of the attribute
    `encoder`.
    """
    if isinstance(model, UNet):
        return [*model.encoder.parameters(), *model.bottleneck.parameters()]
    encoder = getattr(model.network if isinstance(model, Adapter) else model, "encoder", None)
    return list(encoder.parameters()) if isinstance(encoder, nn.Module) else []


def check_encoder(config: Config, model: nn.Module) -> None:
    """Test whether the network has the encoder that `encoder_lr` and `freeze_encoder` are about.

    Raises:
        ConfigError: it has none.
    """
    for field, default in (("encoder_lr", 1.0), ("freeze_encoder", 0)):
        value = getattr(config, field)
        if value != default and not encoder_parameters(model):
            raise ConfigError(
                f"{field}: needs a network whose attribute `encoder` is a module with parameters; {config.network} has "
                f"none; got {value}. Name its encoder so, or use {default:g}."
            )


def _build_smp(config: Config, weights: str) -> nn.Module:
    smp = _import_smp(config)
    _, arch, encoder = config.network.split(":")
    if arch.lower() not in smp.MODEL_ARCHITECTURES_MAPPING:
        known = ", ".join(model.__name__ for model in smp.MODEL_ARCHITECTURES_MAPPING.values())
        raise ConfigError(f"network: segmentation-models-pytorch has no architecture {arch}. Choose one of {known}.")
    universal = encoder.startswith("tu-")  # an encoder of timm, whose name decides its weights
    if weights:
        log.info("encoder_weights: %s of %s, from the cache of the Hugging Face Hub or the network", weights, encoder)
    try:
        network = smp.create_model(
            arch, encoder, encoder_weights=(universal or weights) if weights else None, classes=config.num_outputs
        )
        params = smp.encoders.get_preprocessing_params(encoder, "imagenet" if universal else weights) if weights else {}
    except OSError as error:
        raise ConfigError(
            f"encoder_weights: {weights} of {encoder} cannot be downloaded ({_shorten(error)}). Connect to the "
            "internet once, after which the Hugging Face Hub's cache has them, or leave encoder_weights empty."
        ) from None
    except (KeyError, ValueError, RuntimeError) as error:  # an unknown name, or one that does not fit the architecture
        field = "encoder_weights" if "weights" in str(error) and weights else "network"
        raise ConfigError(
            f"{field}: segmentation-models-pytorch cannot build {config.network}"
            + (f" with {weights}" if weights else "")
            + f" ({_shorten(error)}). Choose another."
        ) from None
    return Adapter(network, params.get("mean", FASTSEG_MEAN), params.get("std", FASTSEG_STD))


def _import_smp(config: Config) -> Any:
    try:
        return importlib.import_module("segmentation_models_pytorch")
    except ImportError:
        reason = "the package is not installed"
    except RuntimeError as error:  # torchvision, which it imports, is of another build than torch
        reason = f"it cannot be imported: {_shorten(error)}"
    raise ConfigError(
        f"network: {config.network} needs segmentation-models-pytorch; {reason}. Run pip install 'fastseg-dali[smp]'."
    )


def _shorten(error: Exception) -> str:
    return str(error.args[0] if error.args else error).strip().partition("\n")[0][:MAX_SHOWN]
