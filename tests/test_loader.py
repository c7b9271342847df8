"""Loader: every pair once per epoch, in an order that any other loader can resume at any step."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_decoders import BROKEN, breaks, copy_pairs, cut_mask, remove_image, run_within

from fastseg import Loader, Pairs
from fastseg.data import host
from fastseg.data import loader as loader_module
from fastseg.data.batch import Batch
from fastseg.data.cache import Cache
from fastseg.data.dali import choice
from fastseg.data.loader import epoch_order
from fastseg.errors import ConfigError, DataError

dali = pytest.param("dali", marks=pytest.mark.dali)


@pytest.fixture
def make(pairs: Pairs, tmp_path: Path) -> Callable[..., Loader]:
    def make(**settings: Any) -> Loader:
        defaults = {"height": 16, "width": 24, "batch_size": 5, "decoder": "host", "cache": "memory"}
        return Loader(settings.pop("pairs", pairs), **{**defaults, "cache_dir": str(tmp_path / "cache"), **settings})

    return make


@pytest.fixture
def own_pairs(pairs_dir: Path, tmp_path: Path) -> Pairs:
    return copy_pairs(pairs_dir, tmp_path)


def indices_of(batches: Iterator[Batch] | Loader | list[Batch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def assert_same_batches(got: list[Batch], expected: list[Batch], *, across_decoders: bool = False) -> None:
    assert indices_of(got) == indices_of(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.masks, other.masks)
        if across_decoders:
            assert (one.images.float() - other.images.float()).abs().mean() < 1.5
        else:
            assert torch.equal(one.images, other.images)


def test_order_is_a_permutation_of_seed_and_epoch_alone() -> None:
    orders = {}
    for count in (1, 2, 17, 1000):
        for seed in (0, 1, 2**62):
            for epoch in (0, 1, 2):
                order = epoch_order(count, seed, epoch)
                assert sorted(order.tolist()) == list(range(count))
                assert np.array_equal(order, epoch_order(count, seed, epoch))
                orders[count, seed, epoch] = tuple(order)
    assert len({order for (count, _, _), order in orders.items() if count > 2}) == 18


def test_order_does_not_depend_on_how_it_is_loaded(make: Callable[..., Loader]) -> None:
    expected = [epoch_order(12, 7, epoch).tolist() for epoch in (0, 1)]
    for settings in ({"batch_size": 1}, {"batch_size": 12}, {"num_workers": 4}, {"cache": "off"}, {"height": 8}):
        torch.manual_seed(3)
        np.random.seed(4)  # noqa: NPY002 (the test is that global state has no effect)
        loader = make(seed=7, **settings)
        for epoch in (0, 1):
            assert [index for batch in loader for index in batch.indices] == expected[epoch], settings


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
@pytest.mark.parametrize("decoder", ["host", dali])
def test_epoch_yields_each_pair_once(make: Callable[..., Loader], decoder: str, cache: str) -> None:
    loader = make(decoder=decoder, cache=cache)
    assert len(loader) == 3
    epochs = []
    for _ in range(3):
        batches = list(loader)
        assert [len(batch.images) for batch in batches] == [5, 5, 2]
        epochs.append([index for batch in batches for index in batch.indices])
        assert sorted(epochs[-1]) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"),
    [(12, 5, 1), (12, 5, 2), (11, 4, 3), (7, 3, 2), (7, 6, 3), (10, 3, 3), (1, 4, 3), (12, 4, 2), (4, 1, 3)],
)
def test_ranks_partition_the_epoch(
    make: Callable[..., Loader], pairs: Pairs, count: int, batch_size: int, world_size: int, drop_last: bool, cache: str
) -> None:
    some = pairs.subset(range(count))
    settings = {"pairs": some, "batch_size": batch_size, "drop_last": drop_last, "cache": cache, "seed": 3}
    alone = make(**settings)
    ranks = [make(rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    for _ in range(2):
        steps = [indices_of(loader) for loader in ranks]
        assert {len(batches) for batches in steps} == {len(alone)} == {len(loader) for loader in ranks}
        assert len(alone) == (count // batch_size if drop_last else -(-count // batch_size))
        for whole, *slices in zip(indices_of(alone), *steps, strict=True):
            assert sorted(flat(slices)) == sorted(whole)
            sizes = [len(part) for part in slices]
            assert max(sizes) - min(sizes) <= 1
        seen = [index for batches in steps for batch in batches for index in batch]
        assert len(set(seen)) == len(seen) == (count // batch_size * batch_size if drop_last else count)


@pytest.mark.dali
def test_ranks_without_a_pair_in_the_last_batch_get_an_empty_one(make: Callable[..., Loader], pairs: Pairs) -> None:
    for rank, sizes in enumerate([[2, 1], [2, 0], [2, 0]]):
        loader = make(
            pairs=pairs.subset(range(7)), batch_size=6, rank=rank, world_size=3, decoder="dali", cache="off"
        )  # fmt: skip
        for _ in range(2):
            assert [len(batch.images) for batch in loader] == sizes


def test_drop_last_leaves_out_other_pairs_each_epoch(make: Callable[..., Loader]) -> None:
    loader = make(drop_last=True)
    assert len(loader) == 2
    left_out = [set(range(12)) - {index for batch in loader for index in batch.indices} for _ in range(20)]
    assert {len(pairs) for pairs in left_out} == {2}
    assert set.union(*left_out) == set(range(12))


def test_evaluation_is_in_the_order_of_the_pairs(make: Callable[..., Loader]) -> None:
    loader = make(shuffle=False)
    for _ in range(2):
        assert indices_of(loader) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


WAYS = [
    {"cache": "off"},
    {"cache": "off", "num_workers": 5},
    {"cache": "memory", "num_workers": 1},
    {"cache": "disk"},
    pytest.param({"decoder": "dali", "cache": "off"}, marks=pytest.mark.dali),
    pytest.param({"decoder": "dali", "cache": "memory", "num_workers": 3}, marks=pytest.mark.dali),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_resuming_gives_the_batches_of_an_uninterrupted_run(make: Callable[..., Loader], way: dict[str, Any]) -> None:
    whole = make(seed=5, cache="off")
    expected = [list(whole) for _ in range(3)]
    for epoch, step in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 2)]:
        interrupted = make(seed=5)
        for _ in range(epoch):
            list(interrupted)
        batches = iter(interrupted)
        for _ in range(step):
            next(batches)
        state = interrupted.state_dict()
        batches.close()

        resumed = make(seed=99, **way)  # the seed is part of the state
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for later in range(epoch, 3):
            got = list(resumed)
            rest = expected[later][step if later == epoch else 0 :]
            assert_same_batches(got, rest, across_decoders="decoder" in way)


def test_state_is_plain_numbers(make: Callable[..., Loader]) -> None:
    loader = make(seed=5)
    next(iter(loader))
    state = loader.state_dict()
    assert state == {"seed": 5, "epoch": 0, "step": 1, "pairs": 12, "batch_size": 5}
    assert {type(value) for value in state.values()} == {int}


def test_state_of_other_data_is_refused(make: Callable[..., Loader], pairs: Pairs) -> None:
    state = make(pairs=pairs.subset(range(11))).state_dict()
    with pytest.raises(ConfigError, match=r"^pairs: .*11; got 12\. .*load_model=false"):
        make().load_state_dict(state)


def test_state_within_an_epoch_of_other_batches_is_refused(make: Callable[..., Loader]) -> None:
    loader = make()
    next(iter(loader))
    with pytest.raises(ConfigError, match=r"^batch_size: must be 5.*got 4\. Give batch_size=5.*load_model=false"):
        make(batch_size=4).load_state_dict(loader.state_dict())
    list(loader)
    other = make(batch_size=4)
    other.load_state_dict(loader.state_dict())  # between epochs it may change
    assert flat(indices_of(other)) == epoch_order(12, 0, 1).tolist()


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
@pytest.mark.parametrize("decoder", ["host", dali])
def test_iteration_resumes_where_the_caller_left_it(make: Callable[..., Loader], decoder: str, cache: str) -> None:
    expected = list(make(decoder=decoder, batch_size=2))
    loader = make(decoder=decoder, cache=cache, batch_size=2)
    got = []
    for stop in (1, 2, 5):
        for batch in loader:
            got.append(batch)
            if len(got) == stop:
                break
    got.extend(loader)
    assert_same_batches(got, expected)
    assert flat(indices_of(loader)) == epoch_order(12, 0, 1).tolist()


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_batches_already_yielded_stay_valid(make: Callable[..., Loader], cache: str) -> None:
    loader = make(cache=cache)
    kept, copies = [], []
    for _ in range(3):
        for batch in loader:
            kept.append(batch)
            copies.append(Batch(batch.images.clone(), batch.masks.clone(), batch.indices.copy()))
    assert_same_batches(kept, copies)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_caller_may_write_into_batches(make: Callable[..., Loader], cache: str) -> None:
    expected = list(make(shuffle=False, cache="off"))
    loader = make(shuffle=False, cache=cache)
    for _ in range(3):
        batches = []
        for batch in loader:
            batches.append(Batch(batch.images.clone(), batch.masks.clone(), batch.indices.copy()))
            batch.images.zero_()
            batch.masks.fill_(9)
            batch.indices[:] = 0
        assert_same_batches(batches, expected)


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
@pytest.mark.parametrize("decoder", ["host", dali])
def test_broken_pair_is_replaced_in_every_epoch_and_logged_once(
    make: Callable[..., Loader], own_pairs: Pairs, caplog: pytest.LogCaptureFixture, decoder: str, cache: str
) -> None:
    breaks(remove_image, own_pairs, BROKEN)
    breaks(cut_mask, own_pairs, BROKEN + 1)
    loader = make(pairs=own_pairs, bad_samples="skip", decoder=decoder, cache=cache)
    reference = make(pairs=own_pairs, bad_samples="skip", cache="off", num_workers=1)
    named = []
    for epoch in range(3):
        caplog.clear()
        batches = list(loader)
        named += [line for line in caplog.messages if line.startswith("left out: ")]
        replaced = [7 if index in (5, 6) else index for index in epoch_order(12, 0, epoch).tolist()]
        assert flat(indices_of(batches)) == replaced
        assert_same_batches(batches, list(reference), across_decoders=decoder == "dali")
    assert sorted(loader.bad.found) == [5, 6]
    assert len(named) == 2
    assert any("images/car1_02.jpg: cannot be read" in line for line in named)


def test_broken_pair_raises_and_the_loader_can_continue(make: Callable[..., Loader], own_pairs: Pairs) -> None:
    path = Path(own_pairs.image_path(BROKEN))
    data = path.read_bytes()
    breaks(remove_image, own_pairs)
    loader = make(pairs=own_pairs, shuffle=False, batch_size=2)
    seen = []
    with pytest.raises(DataError, match=r'car1_02\.jpg: cannot be read .*bad_samples="skip"'):
        seen.extend(batch.indices.tolist() for batch in loader)
    assert seen == [[0, 1], [2, 3]]
    path.write_bytes(data)
    assert indices_of(loader) == [[4, 5], [6, 7], [8, 9], [10, 11]]


def test_only_broken_pairs_are_an_error_and_no_hang(make: Callable[..., Loader], own_pairs: Pairs) -> None:
    for index in range(12):
        breaks(remove_image, own_pairs, index)
    for cache in ("off", "memory"):
        loader = make(pairs=own_pairs, bad_samples="skip", num_workers=4, cache=cache)
        for _ in range(2):
            with pytest.raises(DataError, match=r"none .*12 pairs"):
                run_within(60, functools.partial(list, loader))


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
@pytest.mark.parametrize("decoder", ["host", dali])
def test_iteration_works_in_inference_mode(make: Callable[..., Loader], decoder: str, cache: str) -> None:
    loader = make(decoder=decoder, cache=cache, shuffle=False, height=20)
    with torch.inference_mode():
        inside = list(loader)
    assert_same_batches(list(loader), inside)
    with torch.inference_mode():
        assert_same_batches(list(loader), inside)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["off", "device", "memory", "disk"])
@pytest.mark.parametrize("decoder", ["host", dali])
def test_batches_arrive_on_the_gpu(make: Callable[..., Loader], decoder: str, cache: str) -> None:
    expected = make(cache="off")
    loader = make(device="cuda", decoder=decoder, cache=cache)
    for _ in range(3):
        batches = list(loader)
        assert (
            {batch.images.device.type for batch in batches}
            == {batch.masks.device.type for batch in batches}
            == {"cuda"}
        )
        on_host = [Batch(images.cpu(), masks.cpu(), indices) for images, masks, indices in batches]
        assert_same_batches(on_host, list(expected), across_decoders=True)


def test_mask_modes(make: Callable[..., Loader]) -> None:
    values = {
        mode: torch.cat([batch.masks for batch in make(mask_resize=mode)]).unique() for mode in ("area", "nearest")
    }
    assert values["nearest"].tolist() == [0, 255]
    assert len(values["area"]) > 10


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"height": 0}, "height: .*1; got 0"),
        ({"width": -3}, "width: .*1; got -3"),
        ({"batch_size": 0}, "batch_size: .*1; got 0"),
        ({"num_workers": -1}, "num_workers: .*0; got -1"),
        ({"seed": -1}, "seed: .*0; got -1"),
        ({"world_size": 0}, "world_size: .*1; got 0"),
        ({"rank": 2, "world_size": 2}, "rank: .*world_size, 2; got 2"),
        ({"rank": -1}, "rank: .*0; got -1"),
        ({"decoder": "DALI"}, "decoder: .*auto, host, dali; got 'DALI'"),
        ({"cache": "ram"}, "cache: .*auto, device, memory, disk, off; got 'ram'"),
        ({"mask_resize": "linear"}, "mask_resize: .*area, nearest; got 'linear'"),
        ({"bad_samples": "ignore"}, "bad_samples: .*raise, skip; got 'ignore'"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[..., Loader], settings: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"^{pattern}"):
        make(**settings)


def test_decoder_that_cannot_be_loaded_is_refused(make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"^decoder: DALI .*decoder=host"):
        make(decoder="dali")
    assert make(decoder="auto").decoder.name == "host"


@pytest.mark.parametrize(
    ("on_gpu", "threads", "dali", "expected"),
    [
        (False, 2, True, "host"),
        (True, 2, True, "dali"),
        (True, 16, True, "host"),
        (True, 2, False, "host"),
    ],
)
def test_auto_takes_the_faster_decoder(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, threads: int, dali: bool, expected: str
) -> None:
    monkeypatch.setattr(choice, "has_dali", lambda: dali)
    assert choice.choose_decoder("auto", on_gpu, threads)[0] == expected
    assert choice.choose_decoder("dali", on_gpu, threads)[0] == "dali"


def refuse_driver(*_: Any) -> None:
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


def refuse_argument(*_: Any, **options: Any) -> None:
    raise TypeError("Pipeline.__init__() got an unexpected keyword argument 'exec_dynamic'")


@pytest.mark.dali
@pytest.mark.parametrize(
    ("target", "fault", "reason"),
    [
        ("nvidia.dali.Pipeline.build", refuse_driver, "driver version is insufficient"),
        ("nvidia.dali.Pipeline", refuse_argument, "exec_dynamic"),  # an older DALI
    ],
)
def test_pipeline_that_cannot_be_built(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    target: str, fault: Callable[..., None], reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(target, fault)
    monkeypatch.setattr(loader_module, "choose_decoder", lambda *_: ("dali", "the GPU decodes"))
    with pytest.raises(ConfigError, match=rf"^decoder: DALI .*{reason}.*decoder=host"):
        make(decoder="dali")
    loader = make(decoder="auto")
    assert loader.decoder.name == "host"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "DALI" in warning
    assert reason in warning
    assert_same_batches(list(loader), list(make(decoder="host")))


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_only_waiting_for_the_decoder_is_counted(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    now = 0.0

    def cost(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return original(*args, **options)

        return slowed

    monkeypatch.setattr("fastseg.data.loader.time.perf_counter", lambda: now)
    monkeypatch.setattr(Cache, "put", cost(100, Cache.put))
    monkeypatch.setattr(Cache, "gather", cost(100, Cache.gather))
    loader = make(cache=cache)
    decode = loader.decoder.decode

    def decode_slowly(batches: list[Any]) -> Iterator[Batch]:
        yield from map(cost(1, lambda batch: batch), decode(batches))

    monkeypatch.setattr(loader.decoder, "decode", decode_slowly)
    waited = []
    for _ in range(3):
        before = loader.wait_seconds
        assert len(list(loader)) == 3
        waited.append(loader.wait_seconds - before)
    assert waited == ([3, 3, 3] if cache == "off" else [3, 0, 0])


def test_nothing_is_read_before_the_first_batch_is_requested(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "read_file", lambda path: pytest.fail(f"read {path}"))
    loader = make(cache="disk")
    iter(loader)
    assert len(loader) == 3
