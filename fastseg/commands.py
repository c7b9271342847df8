"""The sub-commands of `fastseg`, one a public function: its arguments, the call, and what is printed.

Flags for fields of `Config` are made from the fields. What is heavy is imported when a command runs: `--help` and a
wrong flag need no torch.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from fastseg.config import Config, as_text

__all__ = ["COMMANDS", "INTERRUPTED", "Command"]

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class Command(NamedTuple):
    """A sub-command: `fastseg NAME`."""

    name: str
    what: str  # it does, in the help
    usage: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status


def _add_config_fields(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag a field; `Config` itself reads and checks the text."""
    for name in names:
        field = Config.model_fields[name]
        default = f" (default: {as_text(field.default)})" if field.default != "" else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field_{name}",
            metavar=_metavar(field.annotation),
            default=argparse.SUPPRESS,
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def _metavar(annotation: Any) -> str:
    """What a field takes, for the help: its choices, or the kind of value."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[annotation]


def _config_fields(options: argparse.Namespace) -> dict[str, Any]:
    return {key.removeprefix("field_"): value for key, value in vars(options).items() if key.startswith("field_")}


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="JSON file of fields, as hyperparams.json; flags win over it")
    _add_config_fields(parser, tuple(Config.model_fields))


def _train(options: argparse.Namespace) -> int:
    changes = _config_fields(options)
    config = Config(**changes) if options.config is None else Config.from_json(options.config).replace(**changes)

    from fastseg.distributed import place_in_group
    from fastseg.training import train  # loads torch: not for `--help` or a wrong value

    result = train(config)
    if result.interrupted:
        print(f"Interrupted. Run the same command again to go on from {result.run_dir / 'last.pt'}.", file=sys.stderr)
        return INTERRUPTED
    if place_in_group()[0] > 0:  # the first process speaks for all
        return 0
    print(
        f"IoU {result.val_iou:.4f}, Dice {result.val_dice:.4f} (means over validation images, epoch "
        f"{result.best_epoch}) after {result.seconds:.0f} s; everything is in {result.run_dir}/"
    )
    return 0


EVALUATE_FIELDS = ("device", "precision", "batch_size", "num_workers", "decoder", "bad_samples", "check_data")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--img-dir", metavar="DIR", required=True, help="folder of images")
    parser.add_argument("--mask-dir", metavar="DIR", required=True, help="folder of masks")
    _add_config_fields(parser, EVALUATE_FIELDS)


def _evaluate(options: argparse.Namespace) -> int:
    from fastseg.inference import evaluate

    scores = evaluate(options.checkpoint, options.img_dir, options.mask_dir, **_config_fields(options))
    print(
        f"{scores['images']} images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); "
        f"IoU {scores['iou_pixels']:.4f}, Dice {scores['dice_pixels']:.4f} (over all pixels)"
    )
    print(json.dumps(scores))
    return 0


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--images", metavar="PATH", nargs="+", required=True, help="folders of photos, or photos")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the masks: DIR/<stem>_mask.png")
    parser.add_argument("--mask-format", metavar="png|gif", default="png", help="of the masks (default: png)")
    parser.add_argument("--probabilities", action="store_true", help="also write <stem>_probability.png, grey 0..255")
    parser.add_argument("--overlays", action="store_true", help="also write <stem>_overlay.jpg, the mask on the photo")
    parser.add_argument("--csv", metavar="FILE", default="", help="also write a table: size, foreground, error")
    parser.add_argument(
        "--tta", metavar="none|flip", default="none", help="flip: mean logits of photo and mirror image (default: none)"
    )
    parser.add_argument("--resume", action="store_true", help="leave photos alone whose results are all there")
    for name, what in (
        ("batch_size", "photos at a time, in each process (default: as in training)"),
        ("num_workers", "decoding and writing threads (default: as many as there are cores)"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=f"field_{name}", metavar="N", default=argparse.SUPPRESS, help=what)
    _add_config_fields(parser, ("device", "precision"))


def _predict(options: argparse.Namespace) -> int:
    from fastseg.distributed import gather_over_processes, place_in_group, process_group
    from fastseg.prediction import predict

    with process_group():
        result = predict(
            options.checkpoint,
            options.images,
            options.out,
            mask_format=options.mask_format,
            probabilities=options.probabilities,
            overlays=options.overlays,
            csv=options.csv,
            tta=options.tta,
            resume=options.resume,
            **_config_fields(options),
        )
        if place_in_group()[0] == 0:  # the first process speaks for all
            print(result.sentence)
        gather_over_processes(None)  # a process that ends with status 1 makes torchrun end the others
    return 1 if result.broken else 0


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="data", help="folder for the four folders (default: data)")
    parser.add_argument(
        "--cars", metavar="N", type=int, default=6, help="a quarter of them for validation (default: 6)"
    )
    parser.add_argument("--views", metavar="N", type=int, default=16, help="views of each car (default: 16)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same bytes (default: 0)")


def _synth(options: argparse.Namespace) -> int:
    from fastseg.data.carvana_like import generate

    made = generate(options.out, cars=options.cars, views=options.views, seed=options.seed)
    print(f"{made['train_pairs']} training and {made['val_pairs']} validation pairs in {options.out}/")
    return 0


COMMANDS = (
    Command("train", "train a network", "[--config FILE] [--any-config-field VALUE ...]", _add_train, _train),
    Command(
        "evaluate",
        "IoU and Dice of a checkpoint on a folder",
        "--checkpoint FILE --img-dir DIR --mask-dir DIR [--FIELD VALUE ...]",
        _add_evaluate,
        _evaluate,
    ),
    Command(
        "predict",
        "masks of photos, at their own size",
        "--checkpoint FILE --images PATH [PATH ...] --out DIR [--probabilities] [--overlays] [--csv FILE] [...]",
        _add_predict,
        _predict,
    ),
    Command("synth", "make Carvana-like pairs", "[--out DIR] [--cars N] [--views N] [--seed N]", _add_synth, _synth),
)
