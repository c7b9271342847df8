"""The command `fastseg`: one sub-command a public function, one flag a field of `Config`.

Bad input ends with one sentence on standard error and status 2; Ctrl-C with status 130.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from fastseg.config import Config, as_text, nearest
from fastseg.errors import ConfigError, FastsegError

__all__ = ["main"]

Command = Callable[[argparse.Namespace], int]

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`.")

    def refuse(self, argument: str) -> NoReturn:
        """Raise the error about an unknown argument, naming the nearest known flag."""
        if not argument.startswith("--"):
            self.error(f"{argument}: is no argument of `{self.prog}`")
        flag, _, _ = argument.partition("=")
        flags = {known[2:].replace("-", "_"): known for known in self._option_string_actions if known.startswith("--")}
        raise ConfigError(f"{flag}: is no flag of `{self.prog}`. Did you mean {flags[nearest(flag[2:], flags)]}?")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    parser = _parser()
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            options.parser.refuse(unknown[0])
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.getLogger("numba").setLevel(logging.WARNING)
        sys.exit(options.run(options))
    except FastsegError as error:
        print(f"fastseg: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastseg: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


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


def _evaluate(options: argparse.Namespace) -> int:
    from fastseg.inference import evaluate

    scores = evaluate(options.checkpoint, options.img_dir, options.mask_dir, **_config_fields(options))
    print(
        f"{scores['images']} images: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f} (means over images); "
        f"IoU {scores['iou_pixels']:.4f}, Dice {scores['dice_pixels']:.4f} (over all pixels)"
    )
    print(json.dumps(scores))
    return 0


def _synth(options: argparse.Namespace) -> int:
    from fastseg.data.carvana_like import generate

    made = generate(options.out, cars=options.cars, views=options.views, seed=options.seed)
    print(f"{made['train_pairs']} training and {made['val_pairs']} validation pairs in {options.out}/")
    return 0


EVALUATE_FIELDS = ("device", "precision", "batch_size", "num_workers", "decoder", "bad_samples", "check_data")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseg", description="Train a segmentation UNet on folders of images and masks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, run: Command, what: str, usage: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, usage=f"%(prog)s {usage}", allow_abbrev=False)
        command.set_defaults(run=run, parser=command)
        return command

    train = add_command("train", _train, "train a network", "[--config FILE] [--any-config-field VALUE ...]")
    train.add_argument("--config", metavar="FILE", help="JSON file of fields, as hyperparams.json; flags win over it")
    _add_config_fields(train, tuple(Config.model_fields))

    evaluate = add_command(
        "evaluate",
        _evaluate,
        "IoU and Dice of a checkpoint on a folder",
        usage="--checkpoint FILE --img-dir DIR --mask-dir DIR [--FIELD VALUE ...]",
    )
    evaluate.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    evaluate.add_argument("--img-dir", metavar="DIR", required=True, help="folder of images")
    evaluate.add_argument("--mask-dir", metavar="DIR", required=True, help="folder of masks")
    _add_config_fields(evaluate, EVALUATE_FIELDS)

    synth = add_command("synth", _synth, "make Carvana-like pairs", "[--out DIR] [--cars N] [--views N] [--seed N]")
    synth.add_argument("--out", metavar="DIR", default="data", help="folder for the four folders (default: data)")
    synth.add_argument("--cars", metavar="N", type=int, default=6, help="a quarter of them for validation (default: 6)")
    synth.add_argument("--views", metavar="N", type=int, default=16, help="views of each car (default: 16)")
    synth.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same bytes (default: 0)")
    return parser


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
