"""What a benchmark reads and writes: its arguments, the machine's description, tables, one line of JSON."""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import fastseg

PACKAGES = ("torch", "numpy", "numba", "simplejpeg", "pillow", "nvidia-dali-cuda120")
BUSY = 0.03  # share of the CPU time above which other processes make the numbers doubtful


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with every default, below the script's docstring as it is."""


def make_parser(doc: str | None, *, data: bool = False, device: bool = False) -> argparse.ArgumentParser:
    """A parser with `--json`, and with `--data` and `--device` where a script takes them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    if data:
        parser.add_argument(
            "--data", metavar="DIR", help="folder with train_images and train_masks; without it, Carvana-like pairs"
        )
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE, a chart beside it if there is one")
    return parser


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an argument: known names, separated by commas; the result has the order of `known`."""

    def names(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown. Use some of {','.join(known)}.")
        return [name for name in known if name in wanted]

    return names


def integers(text: str) -> list[int]:
    """The type of an argument: integers, separated by commas; none in an empty one."""
    return [int(value) for value in text.split(",") if value]


def run(main: Callable[[], int | None]) -> None:
    """Run a script; an error that its user can fix ends it with one message."""
    try:
        sys.exit(main())
    except fastseg.FastsegError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


@functools.cache
def machine() -> dict[str, Any]:
    """The hardware and the system that the numbers depend on."""
    cpu = [line.partition(":")[2].strip() for line in _text("/proc/cpuinfo").splitlines() if "model name" in line]
    memory = [line.split()[1] for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader,nounits"]
    gpu = _output(query).splitlines()
    name, driver, watts = gpu[0].split(", ") if gpu else (None, None, None)
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": cores(),
        "ram_gib": round(int(memory[0]) / 2**20) if memory else None,
        "gpu": name,
        "driver": driver,
        "power_limit_w": watts,
        "system": platform.platform(terse=True),
        "load_at_start": START["load"],
    }


def describe_machine() -> str:
    """One line for titles."""
    return "{cpu}, {cores} cores, ".format(**machine()) + (machine()["gpu"] or "no GPU")


def _others_seconds() -> float:
    """CPU time that other processes than this one and its finished children have used, from an arbitrary start."""
    fields = [int(field) for field in _text("/proc/stat").partition("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _others_share() -> float:
    """Share of this machine's CPU time that other processes have taken since this module was loaded."""
    seconds, others = time.perf_counter() - START["clock"], _others_seconds() - START["others"]
    return max(0.0, others / seconds / (os.cpu_count() or 1))


def _versions(packages: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "fastseg": fastseg.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _text(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def plus_minus(value: float, spread: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], missing: dict[str, str] | None = None) -> None:
    """A Markdown table with numbers aligned right, and below it the rows that are missing with the reason."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1)) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    print(line(header), line(rule), *map(line, rows), sep="\n")
    print_missing(missing or {})


def print_missing(missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")


def write_report(
    suite: str, content: dict[str, Any], path: str | None, packages: Sequence[str] = (), *, finished: bool = True
) -> None:
    """Print the result as one line of JSON, and write it to `path` if there is one.

    A benchmark that still runs passes `finished=False` after each row: nothing is printed, and if it is stopped, its
    rows so far are in the file.
    """
    if not (path or finished):
        return
    arguments = [Path(argument).name if os.path.isabs(argument) else argument for argument in sys.argv[1:]]
    others = round(_others_share(), 3)
    if others > BUSY and finished:
        print(f"The machine was not idle: other processes took {others:.0%} of its CPU time.")
    result = {
        "suite": suite,
        **content,
        "machine": {**machine(), "others_cpu_share": others},
        "versions": _versions([*PACKAGES, *packages]),
        "commit": _output(["git", "describe", "--always", "--dirty"]).strip() or None,
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *arguments]),
    }
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    if finished:
        print(json.dumps(result), flush=True)


START = {"clock": time.perf_counter(), "others": _others_seconds(), "load": round(os.getloadavg()[0], 2)}
