"""decode.py under pytest-benchmark: `pytest benchmarks/test_decode.py --benchmark-enable`."""

from pathlib import Path
from typing import Any

import decode
import decoders
import numpy as np
import pytest

import fastseg

OURS_AND_PILLOW = {f"{decoder.task}: {decoder.name}": decoder for decoder in decoders.ours() + decoders.pillow()}


@pytest.fixture(scope="module")
def files(pairs: fastseg.Pairs) -> dict[str, list[bytes]]:
    images = [Path(pairs.image_path(index)).read_bytes() for index in range(2)]
    masks = [Path(pairs.mask_path(index)).read_bytes() for index in range(2)]
    return {"jpeg": images, "mask": masks, "gif": masks}


@pytest.fixture(scope="module")
def exact(files: dict[str, list[bytes]]) -> Any:
    return decode.exact_answers(files["jpeg"], files["mask"])


@pytest.mark.parametrize("name", OURS_AND_PILLOW)
def test_one_decoder(benchmark: Any, files: Any, exact: Any, name: str) -> None:
    decoder = OURS_AND_PILLOW[name]
    data = files[decoder.task]
    decode.check(decoder, data, exact[decoder.task, decoder.on_blocks])
    benchmark(decoder.decode, data[0])


def test_a_wrong_decoder_is_refused(files: Any, exact: Any) -> None:
    black = decoders.Decoder("jpeg", "black", lambda _: np.zeros((160, 240, 3), np.uint8))
    with pytest.raises(ValueError, match="black: wrong"):
        decode.check(black, files["jpeg"], exact["jpeg", False])


def test_rows_and_limit(files: Any) -> None:
    rows, _ = decode.measure_all(files["jpeg"][:1], files["mask"][:1], repeat=1)
    summary = decode.summarise(rows)
    assert {row["task"] for row in rows} == set(decode.TASKS)
    assert summary["limit_pairs_per_s"] > 0
    assert summary["times_as_fast"]["gif"]["fastseg"] == 1
