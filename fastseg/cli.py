"""The command `fastseg`: one sub-command a public function, one flag a field of `Config`.

Bad input ends with one sentence on standard error and status 2; Ctrl-C with status 130.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastseg.config import Config, unknown_field
from fastseg.errors import ConfigError, FastsegError

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    parser = _parser()
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ConfigError(_unknown_argument(unknown[0], options.command))
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.getLogger("numba").setLevel(logging.WARNING)
        sys.exit(COMMANDS[options.command](options))
    except FastsegError as error:
        print(f"fastseg: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastseg: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _train(options: argparse.Namespace) -> int:
    from fastseg.training import train  # loads torch: not for `--help` or a misspelt flag

    changes = _config_fields(options)
    config = Config.from_json(options.config).replace(**changes) if options.config else Config(**changes)
    result = train(config)
    if result.interrupted:
        print(f"Interrupted. Run the same command again to go on from {result.run_dir / 'last.pt'}.", file=sys.stderr)
        return INTERRUPTED
    print(
        f"IoU {result.val_iou:.4f}, Dice {result.val_dice:.4f} (means over validation images, epoch {result.best_epoch})"
        f" after {result.seconds:.0f} s; everything is in {result.run_dir}/"
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from fastseg.inference import evaluate

    scores = evaluate(options.checkpoint, options.img_dir, options.mask_dir, **_config_fields(options))
    print(f"{scores['images']} images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); ", end="")
    print(f"IoU {scores['iou_pixels']:.4f}, Dice {scores['dice_pixels']:.4f} (over all pixels)")
    print(json.dumps(scores))
    return 0


def _synth(options: argparse.Namespace) -> int:
    from fastseg.data.carvana_like import generate

    made = generate(options.out, cars=options.cars, views=options.views, seed=options.seed)
    print(f"{made['train_pairs']} training and {made['val_pairs']} validation pairs in {options.out}/")
    return 0


COMMANDS = {"train": _train, "evaluate": _evaluate, "synth": _synth}
EVALUATE_FIELDS = ("device", "precision", "batch_size", "num_workers", "decoder", "bad_samples", "check_data")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseg", description="Train a segmentation UNet on folders of images and masks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a network", allow_abbrev=False)
    train.add_argument("--config", metavar="FILE", help="JSON file of fields, such as hyperparams.json; flags win over it")
    _add_config_fields(train, tuple(Config.model_fields))

    evaluate = commands.add_parser("evaluate", help="IoU and Dice of a checkpoint on a folder", allow_abbrev=False)
    evaluate.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    evaluate.add_argument("--img-dir", metavar="DIR", required=True, help="folder of images")
    evaluate.add_argument("--mask-dir", metavar="DIR", required=True, help="folder of masks")
    _add_config_fields(evaluate, EVALUATE_FIELDS)

    synth = commands.add_parser("synth", help="make Carvana-like pairs", allow_abbrev=False)
    synth.add_argument("--out", metavar="DIR", default="data", help="folder for the four folders (data)")
    synth.add_argument("--cars", metavar="N", type=int, default=6, help="cars, a quarter of them for validation (6)")
    synth.add_argument("--views", metavar="N", type=int, default=16, help="views of each car (16)")
    synth.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same bytes (0)")
    return parser


def _add_config_fields(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag a field; `Config` itself reads and checks the text."""
    for name in names:
        field = Config.model_fields[name]
        help_text = f"{field.description} ({field.default})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=f"field_{name}", metavar="VALUE", default=argparse.SUPPRESS, help=help_text)


def _config_fields(options: argparse.Namespace) -> dict[str, Any]:
    return {key.removeprefix("field_"): value for key, value in vars(options).items() if key.startswith("field_")}


def _unknown_argument(argument: str, command: str) -> str:
    if argument.startswith("--") and command == "train":
        return unknown_field(argument[2:].partition("=")[0].replace("-", "_"))
    return f"{argument}: is no known argument of `fastseg {command}`. See `fastseg {command} --help`."
