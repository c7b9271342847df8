"""Pairs per second of every loader on the same files in one run, and the error of its pixels.

    .venv-peers/bin/python benchmarks/loader.py                  # all engines, 256 Carvana-like pairs
    .venv-peers/bin/python benchmarks/loader.py --data DIR --engines host,tutorial --repeat 5 --json loader.json

Each engine runs in processes of its own, in turn with the others. First its pixels are compared with an exact area
average; an engine with wrong pixels is not timed. README.md describes the method and the columns.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chart import LIMIT, OURS, PEER, Bar, draw_bars
from engines import ENGINES, exact_answers, run_engine, run_limit, search_workers
from files import carvana_pairs
from measure import in_fresh_process, median, run_in_turn, spread
from report import cores, describe_machine, make_parser, plus_minus, print_table, run, some_of, write_report

import fastseg

PACKAGES = ("albumentations", "opencv-python-headless", "spdl-io", "torchvision", "torchcodec", "matplotlib")
EPOCHS = ("first_epoch", "later_epochs")
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def measure_all(
    names: list[str], pairs: fastseg.Pairs, workers: int, repeat: int
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """The rows, the limit, and the reason why an engine is missing."""
    missing = {name: "no GPU" for name in names if ENGINES[name].needs_gpu and not torch.cuda.is_available()}
    names = [name for name in names if name not in missing]
    candidates = sorted({1, 2, 3, 4, cores() // 2, cores(), cores() * 3 // 2} - {0})
    searches = {
        name: partial(in_fresh_process, search_workers, name, candidates, pairs)
        for name in names
        if ENGINES[name].search
    }
    found, failed = run_in_turn(searches, 1)
    best = {name: found[name][0] if name in found else workers for name in names if name not in failed}
    answers = exact_answers(pairs)
    jobs = {name: partial(in_fresh_process, run_engine, name, count, pairs, answers) for name, count in best.items()}
    runs, failed_later = run_in_turn(jobs | {"limit": partial(in_fresh_process, run_limit, workers, pairs)}, repeat)
    limit = summarise_limit(runs.pop("limit"), runs.get("host", []), workers)
    return [summarise(name, best[name], done) for name, done in runs.items()], limit, missing | failed | failed_later


def summarise_limit(limits: list[dict[str, float]], hosts: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """The limit of `workers` threads, and the share of it that each run of `host` reached in its turn."""
    one, together = (median([limit[key] for limit in limits]) for key in ("one_thread", "all_threads"))
    found = {
        "limit_pairs_per_s": round(workers * one, 1),
        "limit_threads": workers,
        "limit_together": round(together, 1),
    }
    if hosts:
        rates = [median(host["first"]["rates"]) for host in hosts]
        shares = [rate / workers / limit["one_thread"] for rate, limit in zip(rates, limits, strict=True)]
        found["host_share_of_limit"] = round(median(shares), 3)
    return found


def summarise(name: str, workers: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    def rates(which: str) -> list[float]:
        return [rate for run in runs for rate in run[which]["rates"]]

    def middle(which: str, key: str) -> float:
        return round(median([run[which][key] for run in runs]), 2)

    differ = runs[0]["mask_disagreement"]
    return {
        "engine": name,
        "workers": workers,
        "first_epoch_pairs_per_s": round(median(rates("first")), 1),
        "first_epoch_spread": round(spread(rates("first")), 1),
        "later_epochs_pairs_per_s": round(median(rates("later")), 1),
        "later_epochs_spread": round(spread(rates("later")), 1),
        "cpu_s_per_1000_pairs": middle("first", "cpu_s_per_1000_pairs"),
        "later_cpu_s_per_1000_pairs": middle("later", "cpu_s_per_1000_pairs"),
        "peak_rss_mib": round(median([run["peak_rss_mib"] for run in runs]), 2),
        "mean_abs_error": round(runs[0]["mean_abs_error"], 3),
        "mask_disagreement": None if differ is None else round(differ, 5),
        "note": ENGINES[name].note,
    }


def print_rows(rows: list[dict[str, Any]], limit: dict[str, Any], missing: dict[str, str]) -> None:
    header = ["engine", "workers", "first epoch", "later epochs", "CPU s/1000", "peak MiB", "error", "masks differ", ""]
    table = []
    for row in rows:
        differ = row["mask_disagreement"]
        table.append(
            [
                row["engine"],
                str(row["workers"]),
                *(plus_minus(row[f"{epochs}_pairs_per_s"], row[f"{epochs}_spread"]) for epochs in EPOCHS),
                f"{row['cpu_s_per_1000_pairs']:.2f}",
                f"{row['peak_rss_mib']:.0f}",
                f"{row['mean_abs_error']:.2f}",
                "-" if differ is None else f"{differ:.3%}",
                row["note"],
            ]
        )
    print_table(header, table, missing)
    text = "limit: {limit_pairs_per_s:,.0f} = {limit_threads} threads x one thread's JPEGs at 1/8 per second; "
    print((text + "{limit_threads} threads together {limit_together:,.0f}").format(**limit))
    rate = {row["engine"]: row["first_epoch_pairs_per_s"] for row in rows}
    if "host" in rate:
        print(f"host: {limit['host_share_of_limit']:.0%} of the limit;", end=" ")
        print(", ".join(f"{rate['host'] / rate[name]:.1f} x {name}" for name in rate if name not in ("host", "cached")))


def draw(path: Path, rows: list[dict[str, Any]], limit: dict[str, Any], pairs: int) -> None:
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
    title = f"Carvana-like pairs (1918x1280 JPEG + GIF) to batches of 16 at 160x240: {describe_machine()}"
    subtitle = f"Medians over {pairs} pairs with half the interquartile range; files in the page cache"
    draw_bars(path, title, subtitle, "pairs per second", panels)


def main() -> None:
    parser = make_parser(__doc__, data=True)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--engines", type=some_of(ENGINES), default=",".join(ENGINES))
    parser.add_argument("--repeat", type=int, default=3, help="processes per engine")
    parser.add_argument("--workers", type=int, default=cores(), help="threads of host and cached")
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"), NO_ALBUMENTATIONS_UPDATE="1")
    pairs, data = carvana_pairs(options.data, options.pairs)
    rows, limit, missing = measure_all(options.engines, pairs, options.workers, options.repeat)
    print_rows(rows, limit, missing)
    if options.json:
        draw(Path(options.json).with_suffix(".png"), rows, limit, options.pairs)
    content = {"rows": rows, **limit, "missing": missing, "data": data, "repeat": options.repeat}
    write_report("loader", content, options.json, PACKAGES)


if __name__ == "__main__":
    run(main)
