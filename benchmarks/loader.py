"""Pairs per second of every loader on the same files in one run, and how exact what they deliver is.

    python benchmarks/loader.py                                  # all engines, 256 Carvana-like pairs
    python benchmarks/loader.py --data DIR --engines host,tutorial --repeat 5 --json benchmarks/results/loader.json

Each engine runs in a process of its own, several times, in turn with the others. First its pixels are compared with
an exact area average; one that is wrong is not timed. README.md says how we measure and what the rows mean.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from chart import LIMIT, OURS, PEER, Bar, draw_bars
from engines import ENGINES, exact_answers, run_engine, run_limit, search_workers
from measure import carvana_pairs, cores, describe, machine, median, one_line, print_table, report, spread

import fastseg

PACKAGES = ("albumentations", "opencv-python-headless", "spdl-io", "torchvision", "torchcodec", "matplotlib")
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(
    names: list[str], pairs: fastseg.Pairs, workers: int, repeat: int
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """Rows, the limit, and the engines that could not run with the reason."""
    missing = {name: "no GPU" for name in names if ENGINES[name].needs_gpu and not torch.cuda.is_available()}
    candidates = sorted({1, 2, 3, 4, cores() // 2, cores(), cores() * 3 // 2} - {0})
    answers, best, runs = exact_answers(pairs), dict.fromkeys(names, workers), {name: [] for name in names}
    limits: list[dict[str, float]] = []
    for turn in range(-1, repeat):
        for name in names:
            if name in missing or (turn < 0 and not ENGINES[name].search):
                continue
            print(f"{name}: {f'run {turn + 1} of {repeat}' if turn >= 0 else 'workers'}", file=sys.stderr)
            try:
                if turn < 0:
                    best[name] = in_fresh_process(search_workers, name, candidates, pairs)
                else:
                    runs[name].append(in_fresh_process(run_engine, name, best[name], pairs, answers))
            except (ImportError, OSError, RuntimeError, ValueError, BrokenProcessPool, fastseg.ConfigError) as error:
                missing[name] = one_line(error)
        if turn >= 0:
            limits.append(in_fresh_process(run_limit, workers, pairs))
    rows = [summarise(name, best[name], runs[name]) for name in names if name not in missing]
    one, together = (median([limit[key] for limit in limits]) for key in ("one_thread", "all_threads"))
    limit = {
        "limit_pairs_per_s": round(workers * one, 1),
        "limit_threads": workers,
        "limit_together": round(together, 1),
    }
    if "host" in names and "host" not in missing:
        shares = [
            median(run["first"]["rates"]) / (workers * limit["one_thread"])
            for run, limit in zip(runs["host"], limits, strict=True)
        ]
        limit["host_share_of_limit"] = round(median(shares), 3)
    return rows, limit, missing


def summarise(name: str, workers: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    def rates(which: str) -> list[float]:
        return [rate for run in runs for rate in run[which]["rates"]]

    def middle(get: Callable[[dict[str, Any]], float]) -> float:
        return round(median([get(run) for run in runs]), 2)

    differ = runs[0]["mask_disagreement"]
    return {
        "engine": name,
        "workers": workers,
        "first_epoch_pairs_per_s": round(median(rates("first")), 1),
        "first_epoch_spread": round(spread(rates("first")), 1),
        "later_epochs_pairs_per_s": round(median(rates("later")), 1),
        "later_epochs_spread": round(spread(rates("later")), 1),
        "cpu_s_per_1000_pairs": middle(lambda run: run["first"]["cpu_s_per_1000_pairs"]),
        "later_cpu_s_per_1000_pairs": middle(lambda run: run["later"]["cpu_s_per_1000_pairs"]),
        "peak_rss_mib": middle(lambda run: run["peak_rss_mib"]),
        "mean_abs_error": round(runs[0]["mean_abs_error"], 3),
        "mask_disagreement": None if differ is None else round(differ, 5),
        "note": ENGINES[name].note,
    }


def print_rows(rows: list[dict[str, Any]], limit: dict[str, Any], missing: dict[str, str]) -> None:
    header = ["engine", "workers", "first epoch", "later epochs", "CPU s/1000", "peak MiB", "error", "masks differ", ""]
    table = []
    for row in rows:
        differ = row["mask_disagreement"]
        first, later = (
            f"{row[f'{key}_pairs_per_s']:,.0f} ± {row[f'{key}_spread']:,.0f}" for key in ("first_epoch", "later_epochs")
        )
        cells = [row["engine"], str(row["workers"]), first, later, f"{row['cpu_s_per_1000_pairs']:.2f}"]
        cells += [
            f"{row['peak_rss_mib']:.0f}",
            f"{row['mean_abs_error']:.2f}",
            "-" if differ is None else f"{differ:.3%}",
        ]
        table.append([*cells, row["note"]])
    print_table(header, table)
    for name, reason in missing.items():
        print(f"{name}: not measured ({reason})")
    print(
        "limit: {limit_pairs_per_s:,.0f} = {limit_threads} threads x one thread's JPEGs at 1/8 per second".format(
            **limit
        ),
        end="",
    )
    print(f"; {limit['limit_threads']} threads together {limit['limit_together']:,.0f}")
    rate = {row["engine"]: row["first_epoch_pairs_per_s"] for row in rows}
    if "host" in rate:
        print(f"host: {limit['host_share_of_limit']:.0%} of the limit;", end=" ")
        print(", ".join(f"{rate['host'] / rate[name]:.1f} x {name}" for name in rate if name not in ("host", "cached")))


def draw(path: str, rows: list[dict[str, Any]], limit: dict[str, Any], about: dict[str, Any], pairs: int) -> None:
    def bar(row: dict[str, Any], which: str) -> Bar:
        color = OURS if row["note"].startswith("ours") else PEER
        label = f"{row['engine']}: {row['note'].removeprefix('ours: ')}"
        return Bar(label, row[f"{which}_pairs_per_s"], row[f"{which}_spread"], color)

    streaming = [bar(row, "first_epoch") for row in rows if not row["engine"].startswith("cached")]
    streaming.append(Bar("limit: libjpeg-turbo at 1/8, nothing else", limit["limit_pairs_per_s"], color=LIMIT))
    panels = {"Every epoch reads and decodes the files": streaming}
    cached = [bar(row, "later_epochs") for row in rows if row["engine"].startswith("cached")]
    if cached:
        plain = [bar(row, "later_epochs") for row in rows if row["engine"] in ("host", "tutorial")]
        panels["Later epochs"] = cached + plain
    title = f"Carvana-like pairs (1918x1280 JPEG + GIF) to batches of 16 at 160x240: {describe(about)}"
    subtitle = (
        f"Medians of a run over {pairs} pairs; half the interquartile range as error bar; files in the page cache"
    )
    draw_bars(path, title, subtitle, "pairs per second", panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with train_images and train_masks; default: make Carvana-like pairs")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: all of %(default)s")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cores(), help="threads of host and cached; default: cores")
    parser.add_argument("--json", default="", metavar="FILE", help="write the result here, and a chart beside it")
    parser.add_argument("--chart", default="", metavar="FILE", help="write the chart (PNG) here")
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"), NO_ALBUMENTATIONS_UPDATE="1")
    names = options.engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        parser.error(f"--engines: {', '.join(unknown)} unknown; known: {', '.join(ENGINES)}")
    about = machine()
    pairs, data = carvana_pairs(options.data, options.pairs)
    rows, limit, missing = measure_all(names, pairs, options.workers, options.repeat)
    print_rows(rows, limit, missing)
    chart = options.chart or (str(Path(options.json).with_suffix(".png")) if options.json else "")
    if chart:
        draw(chart, rows, limit, about, options.pairs)
    content = {"rows": rows, **limit, "missing": missing, "data": data, "repeat": options.repeat}
    report("loader", content, about, PACKAGES, options.json)


if __name__ == "__main__":
    main()
