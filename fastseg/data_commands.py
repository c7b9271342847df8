"""The subcommands of `fastseg` about data: check, synth, import."""

import argparse
import shlex

from fastseg.config import Config
from fastseg.flags import add_fields, read_fields
from fastseg.messages import count_of

__all__ = ["add_check", "add_import", "add_synth", "run_check", "run_import", "run_synth"]


def add_check(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastseg check`."""
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        help="a folder with train_images, train_masks, val_images, val_masks (or images, masks); or those themselves",
    )
    parser.add_argument("--json", metavar="FILE", help="write the whole report to this file")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 for warnings, too")
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for near-duplicate images")
    add_fields(parser, ("classes", "ignore_value", "num_workers"))


def run_check(options: argparse.Namespace) -> int:
    """Print the report; the exit status is 1 if there are errors."""
    from fastseg.quality.check import check
    from fastseg.quality.report import print_report

    report = check(*options.folders, duplicates=not options.no_duplicates, **read_fields(options))
    print_report(report)
    if options.json:
        report.to_json(options.json)
    return int(report.count("error") > 0 or (options.strict and report.count("warning") > 0))


def add_synth(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastseg synth`."""
    parser.add_argument("--out", metavar="DIR", default="data", help="folder to write to (default: data)")
    parser.add_argument(
        "--cars", metavar="N", type=int, default=6, help="number of cars; a quarter are for validation (default: 6)"
    )
    parser.add_argument("--views", metavar="N", type=int, default=16, help="views of each car (default: 16)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--parts", action="store_true", help="masks of six classes, and their classes.json")
    parser.add_argument("--hard", action="store_true", help="dark cars on dark floors, reflections, shadows, clutter")


def run_synth(options: argparse.Namespace) -> int:
    """Write the pairs and print their number."""
    from fastseg.synthetic.generate import generate

    names = ("cars", "views", "seed", "parts", "hard")
    counts = generate(options.out, **{name: getattr(options, name) for name in names})
    train, val = count_of(counts["train_pairs"], "training pair"), count_of(counts["val_pairs"], "validation pair")
    print(f"{train} and {val} in {options.out}/")
    return 0


def add_import(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastseg import`."""
    parser.add_argument("kind", metavar="coco|labelme|yolo", help="format of the annotations")
    parser.add_argument(
        "annotations",
        metavar="ANNOTATIONS",
        help="COCO's JSON file, the folder of labelme's JSON files, or YOLO's YAML file or folder of labels",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for images, masks and classes.json")
    parser.add_argument("--images", metavar="DIR", help="folder of the images, if they are elsewhere")
    add_fields(parser, ("num_workers",))


def run_import(options: argparse.Namespace) -> int:
    """Write the pairs and print their number."""
    config = Config(**read_fields(options))

    from fastseg.annotations.convert import import_annotations

    made = import_annotations(
        options.kind, options.annotations, options.out, images=options.images, num_workers=config.num_workers
    )
    print(f"{count_of(made['pairs'], 'pair')} in {options.out}/.")
    train, val = made["folders"].get("train", made["folders"].get("")), made["folders"].get("val", ("", ""))
    if train:  # YOLO's data sets may have a split for validation alone
        folders = {"train_img_dir": train[0], "train_mask_dir": train[1], "val_img_dir": val[0], "val_mask_dir": val[1]}
        words = ["fastseg", "train"]
        for field, value in {**folders, "classes": made["classes"]}.items():
            words += [f"--{field.replace('_', '-')}", str(value)]
        print(f"Train with:\n{shlex.join(words)}")
    return 0
