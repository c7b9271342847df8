"""Memory of two ranks on one machine, which share a cache, beside that of one. It needs Linux.

    python benchmarks/cache_memory.py --json FILE

Each rank reads two epochs with `fastseg.Loader`. The default is the number of Carvana's training pairs at 160x240, all
of them names of one pair of files: a cache of 745 MiB. A rank's memory is its proportional set size (PSS), in which a
page that several processes map counts for each by its part, so that the sum over ranks is what they take together.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import median
from report import make_parser, print_table, run, write_report

import fastseg

PROGRAM = """
import json, sys
from pathlib import Path
import fastseg
from fastseg.runtime.distributed import barrier, get_rank, get_world_size, process_group

folder, cache = sys.argv[1:]
with process_group("cpu"):
    pairs = fastseg.find_pairs(f"{folder}/images", f"{folder}/masks")
    settings = {"height": 160, "width": 240, "batch_size": 16, "num_workers": 1, "decoder": "host", "cache_dir": folder}
    loader = fastseg.Loader(pairs, cache=cache, rank=get_rank(), world_size=get_world_size(), **settings)
    for _ in range(2):
        rows = [int(index) for _, _, indices in loader for index in indices]
        barrier()
    sizes = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    barrier()
    result = {"pss_mib": int(sizes["Pss:"]) / 1024, "rows": rows}
    Path(folder, f"{get_rank()}.json").write_text(json.dumps(result))
"""


def link_pairs(folder: Path, count: int) -> None:
    """`count` names for one generated pair of 240x160 pixels, in folder/images and folder/masks."""
    made = fastseg.generate(folder / "made", cars=2, views=1, width=240, height=160, workers=1, progress=False)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        source = min(made[f"train_{kind}"].iterdir())
        for number in range(count):
            os.link(source, folder / kind / f"{number}_01{'_mask' if kind == 'masks' else ''}{source.suffix}")


def measure(cache: str, processes: int, count: int) -> float:
    """MiB that the ranks take together.

    Raises:
        RuntimeError: a rank failed, or a pair was not read once.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_pairs(folder, count)
        (folder / "program.py").write_text(PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*torchrun, folder / "program.py", folder, cache], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a rank failed: {done.stderr}")
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    if sorted(row for rank in ranks for row in rank["rows"]) != list(range(count)):
        raise RuntimeError("a pair was not read exactly once in an epoch")
    return sum(rank["pss_mib"] for rank in ranks)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", metavar="N", type=int, default=5088)
    parser.add_argument("--repeats", metavar="N", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cache in ("memory", "disk"):
        found = {n: [measure(cache, n, options.pairs) for _ in range(options.repeats)] for n in (1, 2)}
        one, two = median(found[1]), median(found[2])
        rows.append({"cache": cache, "one_mib": one, "two_mib": two, "ratio": two / one, "mib": found})
    table = [[row["cache"], f"{row['one_mib']:.0f}", f"{row['two_mib']:.0f}", f"{row['ratio']:.2f}"] for row in rows]
    print_table(["cache", "one process, MiB", "two processes, MiB", "ratio"], table)
    write_report("cache_memory", {"pairs": options.pairs, "repeats": options.repeats, "rows": rows}, options.json)


if __name__ == "__main__":
    run(main)
