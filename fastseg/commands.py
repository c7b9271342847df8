"""The subcommands of `fastseg`, one per public function: arguments, call and output.

A command imports torch only when it runs, so that `--help` and wrong flags are fast.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fastseg.config import Config
from fastseg.data_commands import add_check, add_import, add_synth, run_check, run_import, run_synth
from fastseg.flags import add_all_fields, add_fields, read_config, read_fields, read_search
from fastseg.messages import count_of

__all__ = ["COMMANDS", "INTERRUPTED", "Command"]

INTERRUPTED = 130  # exit status after Ctrl-C, as a shell reports it


class Command(NamedTuple):
    """A subcommand: `fastseg NAME`."""

    name: str
    description: str
    usage: str  # the arguments
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status


def _train(options: argparse.Namespace) -> int:
    start_time = time.perf_counter()  # the import of torch counts as part of the run
    config = read_config(options)

    from fastseg.runtime.distributed import get_rank
    from fastseg.training.loop import train

    result = train(config, start_time=start_time)
    if result.interrupted:
        print(f"Interrupted. Run the same command again to resume from {result.run_dir / 'last.pt'}.", file=sys.stderr)
        return INTERRUPTED
    if get_rank() == 0:
        over = "classes" if config.classes else "validation images"
        print(
            f"IoU {result.val_iou:.4f}, Dice {result.val_dice:.4f} (means over {over}, epoch "
            f"{result.best_epoch}) after {result.seconds:.0f} s; the run is in {result.run_dir}/"
        )
    return 0


EVALUATE_FIELDS = ("device", "precision", "num_workers", "decoder", "bad_samples", "check_data")
BATCH_SIZE_HELP = "photos per batch in each process (default: as in training)"
REFINE_HELP = "how to refine masks with the photo (default: auto: learned if best.pt has a refiner, else crf or none)"
MAX_NAMED = 3  # images of lowest Dice that `evaluate` prints; its JSON has more


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--img-dir", metavar="DIR", required=True, help="folder of images")
    parser.add_argument("--mask-dir", metavar="DIR", required=True, help="folder of masks")
    parser.add_argument("--out", metavar="DIR", help="write scores.csv, summary.json and worst.png to DIR")
    parser.add_argument(
        "--full-size",
        metavar="true|false",
        default="true",
        choices=("true", "false"),
        help="also score at the photos' own size (default: true)",
    )
    parser.add_argument("--refine", metavar="auto|none|crf|learned", default="auto", help=REFINE_HELP)
    add_fields(parser, EVALUATE_FIELDS)
    _add_number(parser, "batch_size", BATCH_SIZE_HELP)


def _evaluate(options: argparse.Namespace) -> int:
    from fastseg.masks.evaluate import evaluate
    from fastseg.runtime.distributed import get_rank
    from fastseg.runtime.files import json_text

    scores = evaluate(
        options.checkpoint,
        options.img_dir,
        options.mask_dir,
        full_size=options.full_size == "true",
        refine=options.refine,
        out=options.out,
        **read_fields(options),
    )
    if get_rank() > 0:
        return 0
    print(f"{count_of(scores['images'], 'image')}: {_means(scores, '')}, at the training size")
    if options.full_size == "true":
        print(
            f"At the photos' own size (refine {scores['refine']}): {_means(scores, 'full_')}; boundary IoU "
            f"{scores['full_boundary_iou']:.4f} (within {scores['boundary_pixels']} pixels of the outline)"
        )
    worst = [f"{name} ({dice:.4f})" for name, dice in scores["worst"].items()]
    print(f"Lowest Dice: {', '.join(worst[:MAX_NAMED])}")
    if options.out is not None:
        pictures = ["confusion.png"] * ("class_iou" in scores) + ["worst.png"] * (options.full_size == "true")
        *names, last = ["scores.csv", "summary.json", *pictures]
        print(f"{', '.join(names)} and {last} are in {options.out}/")
    print(json_text(scores))
    return 0


def _means(scores: dict[str, Any], size: str) -> str:
    if "class_iou" in scores:
        each = [f"{name} {iou:.4f}" for name, iou in scores[f"{size}class_iou"].items() if iou is not None]
        return (
            f"IoU {scores[f'{size}iou']:.4f}, Dice {scores[f'{size}dice']:.4f} (means over classes); pixel accuracy "
            f"{scores[f'{size}pixel_accuracy']:.4f}; IoU of {', '.join(each)}"
        )
    return (
        f"IoU {scores[f'{size}iou']:.4f}, Dice {scores[f'{size}dice']:.4f} (means over images); "
        f"IoU {scores[f'{size}iou_pixels']:.4f}, Dice {scores[f'{size}dice_pixels']:.4f} (over all pixels)"
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--images", metavar="PATH", nargs="+", required=True, help="folders of photos, or photos")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the masks: DIR/<stem>_mask.png")
    parser.add_argument("--mask-format", metavar="png|gif", default="png", help="format of the masks (default: png)")
    parser.add_argument("--probabilities", action="store_true", help="also write <stem>_probability.png, grey 0..255")
    parser.add_argument("--overlays", action="store_true", help="also write <stem>_overlay.jpg, mask over photo")
    parser.add_argument("--csv", metavar="FILE", default="", help="also write a table of size, foreground and errors")
    parser.add_argument("--refine", metavar="auto|none|crf|learned", default="auto", help=REFINE_HELP)
    parser.add_argument(
        "--tta", metavar="none|flip", default="none", help="flip: mean logits of photo and mirror image (default: none)"
    )
    parser.add_argument("--resume", action="store_true", help="skip photos whose results all exist")
    _add_number(parser, "batch_size", BATCH_SIZE_HELP)
    _add_number(parser, "num_workers", "decoding and writing threads; 0: one per core (default: 0)")
    add_fields(parser, ("device", "precision"))


def _add_number(parser: argparse.ArgumentParser, field: str, help: str) -> None:
    """A flag for a field whose default is not that of `Config`."""
    flag = f"--{field.replace('_', '-')}"
    parser.add_argument(flag, dest=f"field_{field}", metavar="N", default=argparse.SUPPRESS, help=help)


def _predict(options: argparse.Namespace) -> int:
    from fastseg.masks.predict import predict
    from fastseg.runtime.distributed import barrier, get_rank, process_group

    fields = read_fields(options)
    with process_group(fields.get("device", "auto")):
        result = predict(
            options.checkpoint,
            options.images,
            options.out,
            mask_format=options.mask_format,
            probabilities=options.probabilities,
            overlays=options.overlays,
            csv=options.csv,
            refine=options.refine,
            tta=options.tta,
            resume=options.resume,
            **fields,
        )
        if get_rank() == 0:
            print(result.message)
        barrier()  # torchrun ends all ranks when one exits with status 1
    return 1 if result.broken else 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write: .onnx, .pt2 or .safetensors")
    parser.add_argument("--format", metavar="onnx|torch|safetensors", help="format (default: by the file's extension)")


def _export(options: argparse.Namespace) -> int:
    from fastseg.network.export import export

    exported = export(options.checkpoint, options.out, options.format)
    print(_describe_export(options.out, exported))
    if refiner := exported.get("refiner"):
        print(_describe_export(os.path.join(os.path.dirname(options.out), refiner["file"]), refiner))
    return 0


def _describe_export(path: str, exported: dict[str, Any]) -> str:
    difference = exported["max_difference"]
    within = f"within {difference:.1e} of the network" if difference else "identical to the network"
    compared = "not compared with the network" if difference is None else within
    return f"{path}: {exported['format']}, {exported['bytes'] / 1e6:.1f} MB, {compared}"


def _add_submission(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--masks", metavar="DIR", required=True, help="folder of masks, named like their images")
    parser.add_argument("--out", metavar="FILE", required=True, help="CSV file to write")
    parser.add_argument("--images", metavar="DIR", help="folder of images; each must have a mask of its size")
    add_fields(parser, ("num_workers",))


def _submission(options: argparse.Namespace) -> int:
    config = Config(**read_fields(options))

    from fastseg.masks.submission import BrokenMasksError, write_submission

    try:
        lines = write_submission(options.masks, options.out, images=options.images, num_workers=config.num_workers)
    except BrokenMasksError as error:
        print(*error.messages, f"fastseg: {error}", sep="\n", file=sys.stderr)
        return 1
    print(f"{options.out}: {count_of(lines, 'line')}")
    return 0


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--search",
        metavar="FIELD=VALUES",
        action="append",
        required=True,
        help="field to search, over LOW:HIGH, LOW:HIGH:log or A,B,C; repeat for more fields",
    )
    parser.add_argument(
        "--trials", metavar="N", type=int, required=True, help="total number of trials, those of earlier runs included"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the study; an existing study resumes")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="trials at once, each on its own cores")
    parser.add_argument("--study", metavar="NAME", default="", help="name of the study (default: name of the folder)")
    add_all_fields(parser)


def _tune(options: argparse.Namespace) -> int:
    config, search = read_config(options), read_search(options.search)

    from fastseg.tuning.tune import tune

    where = {"out_dir": options.out, "study": options.study, "processes": options.processes}
    result = tune(config, search, trials=options.trials, **where)
    if result.best is not None:
        from fastseg.tuning.report import print_study  # needs Optuna, which `tune` has checked for

        print_study(result.trials, search)
        print(f"Best Dice {result.val_dice:.4f}. Train with `fastseg train --config {result.out_dir / 'best.json'}`.")
    if result.interrupted:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        return INTERRUPTED
    return 0


COMMANDS = (
    Command("train", "train a network", "[--config FILE] [--any-config-field VALUE ...]", add_all_fields, _train),
    Command(
        "evaluate",
        "score a checkpoint on a folder of pairs",
        "--checkpoint FILE --img-dir DIR --mask-dir DIR [--out DIR] [--refine METHOD] [--FIELD VALUE ...]",
        _add_evaluate,
        _evaluate,
    ),
    Command(
        "predict",
        "write masks of photos at their own size",
        "--checkpoint FILE --images PATH [PATH ...] --out DIR [--probabilities] [--overlays] [--csv FILE] [...]",
        _add_predict,
        _predict,
    ),
    Command(
        "export",
        "export a network to ONNX, torch.export or safetensors",
        "--checkpoint FILE --out FILE [--format onnx|torch|safetensors]",
        _add_export,
        _export,
    ),
    Command(
        "submission",
        "write masks as Kaggle's run-length CSV",
        "--masks DIR --out FILE [--images DIR] [--num-workers N]",
        _add_submission,
        _submission,
    ),
    Command(
        "tune",
        "search for better settings",
        "--search FIELD=VALUES ... --trials N --out DIR [--config FILE] [--any-config-field VALUE ...]",
        _add_tune,
        _tune,
    ),
    Command(
        "check",
        "find the faults of a data set; exit status 1 if there are errors",
        "DIR... [--classes CLASSES] [--json FILE] [--strict] [--no-duplicates] [--num-workers N]",
        add_check,
        run_check,
    ),
    Command("synth", "make Carvana-like pairs", "[--out DIR] [--cars N] [--views N] [--parts]", add_synth, run_synth),
    Command(
        "import",
        "make masks of COCO's, labelme's or YOLO's annotations",
        "coco|labelme|yolo ANNOTATIONS --out DIR [--images DIR] [--num-workers N]",
        add_import,
        run_import,
    ),
)
