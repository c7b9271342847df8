"""The outline refiner: its tiles against the whole photo, its training, and what checkpoints hold of it."""

import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.data.host import load_photo
from fastseg.errors import CheckpointError, ConfigError
from fastseg.network.checkpoint import load_checkpoint, load_model, save_checkpoint
from fastseg.network.outline import refiner as refiner_module
from fastseg.network.outline.refiner import Refiner, choose_scale, find_outline, read_refiner, refine_outline
from fastseg.network.outline.upsample import upsample_logits
from fastseg.runtime.device import choose_runtime
from fastseg.training.budget import Budget
from fastseg.training.outline import fit, patches, plan, train
from fastseg.training.outline.train import refiner_loss
from tests.conftest import fields, write_checkpoint
from tests.outlines import dense_refinement, near_outline, random_refiner


def blobs(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth logits (C, height, width) of several outlines."""
    noise = torch.randn(1, channels, 4, 5, generator=torch.Generator().manual_seed(seed))
    return 8 * torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0]


def pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("cells", [(16, 24), (21, 13), (3, 50)])
def test_tiles_equal_the_whole_photo(channels, scale, cells):
    refiner, logits = random_refiner(channels, scale), blobs(channels, *cells)
    photo = pixels(cells[0] * scale, cells[1] * scale)
    size = (cells[0] * 8 - 3, cells[1] * 8)
    found, expected = refine_outline(refiner, logits, photo, size), dense_refinement(refiner, logits, photo, size)
    assert found.shape == expected.shape == (channels, *photo.shape[:2])
    assert torch.allclose(found, expected, atol=1e-4)
    upsampled = upsample_logits(logits[None], *size, onto=(photo.shape[0], photo.shape[1]))[0]
    assert (found - upsampled).abs().max() > 0.1


@pytest.mark.parametrize("channels", [1, 4])
def test_outline_is_where_another_label_is_near(channels):
    logits = blobs(channels, 30, 41)
    np.testing.assert_array_equal(find_outline(logits[None])[0].numpy(), near_outline(logits))


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_photos_without_an_outline_keep_their_logits(value):
    refined = refine_outline(random_refiner(1, 2), torch.full((1, 8, 12), value), pixels(16, 24), (64, 96))
    assert torch.equal(refined, torch.full((1, 16, 24), value))


def test_many_tiles_are_refined_in_parts(monkeypatch):
    refiner, logits, photo = random_refiner(3, 2), blobs(3, 40, 60), pixels(80, 120)
    whole = refine_outline(refiner, logits, photo, (160, 240))
    monkeypatch.setattr(refiner_module, "MAX_POINTS", 3 * (16 + 2 * refiner.halo) ** 2)
    assert torch.allclose(refine_outline(refiner, logits, photo, (160, 240)), whole, atol=1e-5)


def test_a_new_refiner_changes_nothing():
    refiner, logits = Refiner(1, 4), blobs(1, 16, 24)
    refiner.reset(torch.Generator().manual_seed(0))
    refined = refine_outline(refiner.eval(), logits, pixels(64, 96), (128, 192))
    assert torch.equal(refined, upsample_logits(logits[None], 128, 192, onto=(64, 96))[0])


@pytest.mark.parametrize(
    ("cells", "photo", "scale"),
    [((160, 240), (1280, 1918), 4), ((640, 960), (1280, 1918), 1), ((32, 48), (64, 96), 2), ((16, 16), (4000, 9), 8)],
)
def test_scale_has_960_points_or_all_pixels(cells, photo, scale):
    assert choose_scale(cells, photo) == scale


def test_loss_is_cross_entropy_where_the_network_is_uncertain():
    config = fastseg.Config(classes=["a", "b", "c"])
    refined, logits = blobs(3, 6, 7, seed=1)[None], blobs(3, 6, 7)[None]
    masks = torch.randint(0, 3, (1, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks[0, :2] = 255
    shares = torch.from_numpy(np.exp(refined[0].double().numpy()))
    shares /= shares.sum(0)
    total = weights = 0.0
    for y in range(2, 6):
        for x in range(7):
            first, second = sorted(logits[0, :, y, x].tolist(), reverse=True)[:2]
            weight = 1.0 if first - second < 5 else 0.05
            total -= weight * np.log(shares[int(masks[0, y, x]), y, x].item())
            weights += weight
    assert refiner_loss(refined, logits, masks, config).item() == pytest.approx(total / weights, rel=1e-5)


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "BATCH", 8)
        patch.setattr(patches, "MAX_PATCHES", 1024)
        yield


@pytest.fixture(scope="module")
def trained(pairs_dir, tmp_path_factory):
    """A run whose best.pt has a refiner."""
    out = tmp_path_factory.mktemp("refined")
    return fastseg.train(fields(pairs_dir, out, num_epochs=6, refiner_steps=40))


def test_the_end_of_a_training_adds_a_refiner_to_best(trained, pairs_dir):
    best = load_checkpoint(trained.run_dir / "best.pt")
    assert best["scores"]["epoch"] == trained.best_epoch
    refiner = read_refiner(trained.run_dir / "best.pt")
    assert refiner is not None
    assert (int(refiner.scale), refiner.training) == (2, False)
    scores = json.loads((trained.run_dir / "summary.json").read_text())["outline_refiner"]
    assert (scores["used"], scores["images"]) == (True, 12)
    assert scores["dice"]["learned"] > max(scores["dice"]["none"], scores["dice"]["crf"])
    assert read_refiner(trained.run_dir / "last.pt") is None
    scores = {
        method: fastseg.evaluate(
            trained.run_dir / "best.pt", pairs_dir / "images", pairs_dir / "masks", device="cpu", refine=method
        )
        for method in ("auto", "learned", "none")
    }
    assert scores["auto"] == scores["learned"]
    assert scores["learned"]["full_dice"] > scores["none"]["full_dice"] + 0.002


def test_predicted_masks_are_those_of_the_refiner(trained, pairs_dir, tmp_path):
    best = trained.run_dir / "best.pt"
    result = fastseg.predict(best, pairs_dir / "images", tmp_path, device="cpu", precision="fp32")
    assert result.seconds_by_part["outline refiner"] > 0
    model, refiner = load_model(best)[0], read_refiner(best)
    for path in (pairs_dir / "images").iterdir():
        cells = torch.from_numpy(load_photo(str(path), (32, 48)))
        with torch.inference_mode():
            logits = model(((cells / 255 - 0.5) / 0.25).permute(2, 0, 1)[None])[0]
            refined = dense_refinement(refiner, logits, torch.from_numpy(load_photo(str(path), (64, 96))), (64, 96))
        with Image.open(tmp_path / f"{path.stem}_mask.png") as mask:
            assert (np.asarray(mask) != (refined[0] > 0).numpy()).mean() < 1e-3


def test_an_interrupted_refiner_is_trained_again_to_the_same_weights(trained, pairs_dir, tmp_path, monkeypatch):
    def interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return augment(*arguments)

    augment, config = train._augment, fields(pairs_dir, tmp_path, num_epochs=6, refiner_steps=40)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_augment", interrupt)
        result = fastseg.train(config)
    assert (result.interrupted, len(result.history)) == (True, 6)
    assert read_refiner(result.run_dir / "best.pt") is None
    assert not fastseg.train(config).interrupted
    refiners = [load_checkpoint(run / "best.pt")["refiner"] for run in (result.run_dir, trained.run_dir)]
    assert refiners[0].keys() == refiners[1].keys()
    assert all(torch.equal(refiners[0][key], refiners[1][key]) for key in refiners[0])


def test_a_time_budget_decides_its_length_once(trained, pairs_dir, tmp_path, monkeypatch):
    """An interrupted refiner repeats the steps that were decided, however much time is left."""
    lengths, stopped = [], []

    def train_refiner(refiner, patches, run, steps, **_):
        lengths.append(steps)
        if len(lengths) == 5 and not stopped:  # after twice two that are timed
            stopped.append(run)
            run.stop_requested = True

    monkeypatch.setattr(fit, "train_refiner", train_refiner)
    monkeypatch.setattr(plan, "train_refiner", train_refiner)
    monkeypatch.setattr(plan, "seconds_left", lambda run: 1e9 if not stopped else 2e9)
    start = {"checkpoint": trained.run_dir / "best.pt", "learning_rate": 1e-6, "time_budget": 3}
    settings = fields(pairs_dir, tmp_path, refiner_steps=300, min_steps=1) | start
    del settings["num_epochs"]
    result = fastseg.train(settings)
    assert result.interrupted
    stored = plan.Plan(**load_checkpoint(result.run_dir / "best.pt")["refiner_plan"])
    assert stored == plan.Plan(12, 12, 3, lengths[4], stored.score_s)  # all photos
    assert lengths[4] > 10**5
    assert not fastseg.train(settings).interrupted
    assert lengths[5:] == [lengths[4]]


@pytest.mark.parametrize(
    ("step_s", "former", "seconds"),
    [(0.1, 0, 100 / 3), (0.8, 0, 100 / 3), (0.9, 0, 0), (0.1, 20, 100 / 3), (0.9, 50, 50)],
)
def test_a_time_budget_reserves_a_third_of_what_is_left(step_s, former, seconds, pairs_dir, monkeypatch):
    """Nothing where less than 40 % of its steps would fit, and not less than a smaller budget has reserved."""
    monkeypatch.setattr(plan, "_time_steps", lambda *_: step_s)
    pairs = fastseg.find_pairs(pairs_dir / "images", pairs_dir / "masks")
    monkeypatch.setattr(plan, "used_seconds", lambda run: 20.0)
    run = SimpleNamespace(
        config=fastseg.Config(refiner_steps=100),
        budget=Budget(120.0, former_refiner_seconds=former),
        is_finished=False,
        runtime=SimpleNamespace(rank=0),
        train_loader=SimpleNamespace(pairs=pairs),
    )
    plan.reserve_refiner_seconds(run)
    assert run.budget.refiner_seconds == pytest.approx(seconds)
    monkeypatch.setattr(plan, "_time_steps", None)  # it is decided once
    plan.reserve_refiner_seconds(run)


def test_a_time_budget_plans_it_by_its_own_times(trained, pairs_dir, tmp_path):
    start = {"checkpoint": trained.run_dir / "best.pt", "learning_rate": 1e-6, "time_budget": 8}
    settings = fields(pairs_dir, tmp_path, refiner_steps=5) | start
    del settings["num_epochs"]
    result = fastseg.train(settings)
    stored = plan.Plan(**load_checkpoint(result.run_dir / "best.pt")["refiner_plan"])
    assert 1 <= stored.num_train <= 12
    assert 1 <= stored.num_val <= 12
    assert stored.steps >= 1
    assert stored.budget == 8


def test_a_signal_while_patches_are_cut_stores_no_plan(trained, pairs_dir, tmp_path, monkeypatch):
    """The steps that are timed would be cut short."""
    cut = fit._cut_patches

    def stop(refiner, pairs, run, rng):
        run.stop_requested = True
        return cut(refiner, pairs, run, rng)

    start = {"checkpoint": trained.run_dir / "best.pt", "learning_rate": 1e-6, "time_budget": 5}
    settings = fields(pairs_dir, tmp_path, refiner_steps=5) | start
    del settings["num_epochs"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_cut_patches", stop)
        result = fastseg.train(settings)
    assert result.interrupted
    state = load_checkpoint(result.run_dir / "best.pt")
    assert "refiner_plan" not in state
    assert "refiner" not in state


def test_a_time_budget_that_is_too_short_leaves_it_out(pairs_dir, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(plan, "_time_steps", lambda *_: 1.0)
    monkeypatch.setattr(fit, "train_refiner", None)
    settings = fields(pairs_dir, tmp_path, refiner_steps=300, time_budget=3)
    del settings["num_epochs"]
    result = fastseg.train(settings)
    assert "outline refiner: left out" in caplog.text
    assert read_refiner(result.run_dir / "best.pt") is None
    assert load_checkpoint(result.run_dir / "last.pt")["budget"]["refiner_seconds"] == 0  # all is the network's


def examples_of(pairs, model, **changes):
    config = fastseg.Config(image_height=32, image_width=48, batch_size=5, device="cpu", precision="fp32", **changes)
    return list(patches.read_examples(pairs, model, 2, config, choose_runtime(config)))


def test_examples_are_computed_in_parts_that_fit_in_memory(trained, pairs):
    model = load_model(trained.run_dir / "best.pt")[0]

    def small(images):
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return model(images)

    whole, parts = examples_of(pairs, model), examples_of(pairs, small)
    assert len(whole) == len(parts) == 12
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.photo, other.photo)
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


def test_the_next_photo_replaces_a_broken_one(trained, data):
    """As in training. Photos that another process has skipped are not known to this one."""
    model, pairs = load_model(trained.run_dir / "best.pt")[0], fastseg.find_pairs(data / "images", data / "masks")
    whole = examples_of(pairs, model)
    (data / "images" / pairs.images[1]).write_bytes(b"broken")
    rest = examples_of(pairs, model, bad_samples="skip")
    for one, other in zip([whole[0], whole[2], *whole[2:]], rest, strict=True):
        assert torch.equal(one.photo, other.photo)
        assert torch.equal(one.mask, other.mask)
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


def test_a_photo_that_cannot_be_read_does_not_cost_the_refiner_for_good(pairs_dir, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise fastseg.DataError("a.jpg: cannot be read")

    config = fields(pairs_dir, tmp_path, num_epochs=6, refiner_steps=3)
    for place in ("new_refiner", "_cut_patches"):
        with monkeypatch.context() as patch:
            patch.setattr(fit, place, fail)
            result = fastseg.train(config)
        assert "a.jpg: cannot be read" in caplog.text
        assert (result.run_dir / "summary.json").exists()
        assert "refiner" not in load_checkpoint(result.run_dir / "best.pt")
    fastseg.train(config)
    assert "refiner" in load_checkpoint(result.run_dir / "best.pt")


@pytest.mark.parametrize(("finished", "seconds"), [(True, 1000), (False, 15)])
def test_a_run_that_ends_early_gives_it_its_part_of_the_budget_alone(finished, seconds, monkeypatch):
    """`after_epoch` or `early_stopping` has ended it."""
    monkeypatch.setattr(plan, "seconds_left", lambda run: 1000.0)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: 105.0)
    run = SimpleNamespace(budget=Budget(3600.0, refiner_seconds=20.0), is_finished=finished, refiner_start=100.0)
    assert plan._refiner_seconds_left(run) == seconds


def test_a_finished_run_keeps_its_refiner(trained, pairs_dir, monkeypatch):
    monkeypatch.setattr(fit, "train_refiner", None)
    again = fastseg.train(json.loads((trained.run_dir / "config.json").read_text()))
    assert again.best_epoch == trained.best_epoch


def test_another_number_of_steps_trains_it_again(pairs_dir, tmp_path, monkeypatch):
    lengths, train_refiner = [], fit.train_refiner

    def record(refiner, patches, run, steps, **options):
        lengths.append(steps)
        train_refiner(refiner, patches, run, steps, **options)

    monkeypatch.setattr(fit, "train_refiner", record)
    for steps in (3, 3, 5, 5, 0):
        result = fastseg.train(fields(pairs_dir, tmp_path, num_epochs=6, refiner_steps=steps))
    assert lengths == [3, 5]
    assert load_checkpoint(result.run_dir / "best.pt")["config"]["refiner_steps"] == 5


def test_a_time_budget_that_is_used_up_trains_none_and_says_so(pairs_dir, tmp_path, monkeypatch, caplog):
    """At the end of the budget, or a step before it."""
    monkeypatch.setattr(plan, "_time_steps", lambda *_: 1e-3)
    caplog.set_level("INFO")
    settings = fields(pairs_dir, tmp_path, refiner_steps=0, time_budget=2)
    del settings["num_epochs"]
    fastseg.train(settings)
    assert "outline refiner: " not in caplog.text
    monkeypatch.setattr(plan, "used_seconds", lambda run: 2.0)
    result = fastseg.train({**settings, "refiner_steps": 5})
    assert re.search(
        "outline refiner: (not trained, because nothing .* is left|left out; the time_budget leaves it 0 s, .*)",
        caplog.text,
    )
    assert "refiner" not in load_checkpoint(result.run_dir / "best.pt")


def test_a_refiner_that_does_not_help_is_left_out(pairs_dir, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(fit, "train_refiner", lambda refiner, *rest: torch.nn.init.constant_(refiner.head.bias, 30))
    result = fastseg.train(fields(pairs_dir, tmp_path, num_epochs=6, refiner_steps=1))
    assert read_refiner(result.run_dir / "best.pt") is None
    assert "not used" in caplog.text
    monkeypatch.setattr(fit, "train_refiner", None)  # it is not tried again
    fastseg.train(fields(pairs_dir, tmp_path, num_epochs=6, refiner_steps=1))


def test_the_tutorial_recipe_has_no_refiner():
    assert fastseg.Config(recipe="tutorial").refiner_steps == 0
    assert fastseg.Config(recipe="tutorial", refiner_steps=5).refiner_steps == 5
    assert fastseg.Config().refiner_steps > 0


def test_learned_needs_a_refiner(pairs_dir, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    for call in (
        lambda: fastseg.predict(checkpoint, pairs_dir / "images", tmp_path / "out", device="cpu", refine="learned"),
        lambda: fastseg.evaluate(checkpoint, pairs_dir / "images", pairs_dir / "masks", device="cpu", refine="learned"),
    ):
        with pytest.raises(ConfigError, match=r"^refine: learned .*refiner_steps.*Use auto"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights | {"scale": torch.tensor(10**6)},
        lambda weights: weights | {"scale": torch.tensor(0)},
        lambda weights: weights | {"head.weight": torch.zeros(2, 16, 1, 1)},
        lambda weights: {key: value for key, value in weights.items() if key != "head.bias"},
        lambda weights: weights | {"more": torch.zeros(1)},
        lambda weights: [1, 2],
        lambda weights: dict.fromkeys(weights, 1),
    ],
)
def test_refiners_that_do_not_fit_are_refused(change, tmp_path):
    path = write_checkpoint(tmp_path / "best.pt")
    save_checkpoint(path, {**load_checkpoint(path), "refiner": change(random_refiner(1, 2).state_dict())})
    with pytest.raises(CheckpointError, match=r"best\.pt: .*refiner.*another checkpoint"):
        read_refiner(path)


def test_a_configuration_that_is_not_valid_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt")
    state = load_checkpoint(path)
    state["config"]["classes"] = 5
    save_checkpoint(path, {**state, "refiner": random_refiner(1, 2).state_dict()})
    with pytest.raises(CheckpointError, match=r"best\.pt: its configuration.*another checkpoint"):
        fastseg.load_refiner(path)


@pytest.mark.gpu
def test_logits_of_a_gpu_are_refined_as_those_of_the_cpu():
    refiner, logits, photo = random_refiner(1, 4), blobs(1, 40, 60), pixels(160, 240)
    here = refine_outline(refiner, logits, photo, (320, 480))
    there = refine_outline(refiner.cuda(), logits, photo, (320, 480))
    assert torch.allclose(there, here, atol=1e-2)
