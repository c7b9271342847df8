"""The recipe: learning rate, image sizes, weight averaging, patience."""

import copy
import math

import numpy as np
import pytest
import torch

import fastseg
from fastseg.training.loop import train_step
from fastseg.training.recipe import learning_rate, make_optimizer, set_learning_rate, training_size
from fastseg.training.step.muon import MUON, norm_biases_of, orthogonalise
from tests.test_training import config, same, weights


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_cycle_rises_to_its_peak_and_ends_at_zero(optimizer):
    settings = fastseg.Config(learning_rate=1e-4, optimizer=optimizer)
    rates = [learning_rate(settings, step, 400) for step in range(401)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[100] == pytest.approx(3e-3)
    assert rates[400] == pytest.approx(0, abs=1e-9)
    assert np.all(np.diff(rates[:101]) > 0)
    assert np.all(np.diff(rates[100:]) < 0)
    assert (np.ptp(np.diff(rates[:101])) < 1e-9) == (np.ptp(np.diff(rates[100:])) < 1e-9) == (optimizer == "muon")
    assert {learning_rate(settings.replace(recipe="tutorial"), step, 400) for step in range(400)} == {1e-4}


def test_the_first_steps_see_half_of_the_size():
    settings = fastseg.Config(progressive_resizing=0.5)
    sizes = [training_size(settings, step, 100) for step in range(100)]
    assert sizes == [(80, 128)] * 50 + [(160, 240)] * 50  # 120 is not divisible by 16
    assert training_size(settings.replace(progressive_resizing=0), 0, 100) == (160, 240)
    assert training_size(settings.replace(recipe="tutorial"), 0, 100) == (160, 240)
    tiny = settings.replace(image_height=16, image_width=48)
    assert training_size(tiny, 0, 100) == (16, 48)  # 1 x 1 cells have no batch statistics at batch size 1


def test_the_ema_of_the_weights_is_scored_and_saved(pairs_dir, tmp_path, monkeypatch):
    """best.pt holds the EMA of every step's weights, compared with one computed in float64."""
    states = []

    def record(run, images, masks):
        train_step(run, images, masks)
        states.append({key: value.double() for key, value in run.model.state_dict().items()})

    monkeypatch.setattr("fastseg.training.loop.train_step", record)
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, ema_decay=0.7, batch_size=2))
    average = {key: torch.zeros_like(value) for key, value in states[0].items()}
    for step, state in enumerate(states):
        share = max(0.3, 1 / (step + 1))  # the mean of the first steps, then an exponential average
        average = {key: (1 - share) * average[key] + share * state[key] for key in state}
    saved = weights(result.run_dir / "best.pt")
    assert len(states) >= 3
    for key in ("head.weight", "encoder.0.1.running_var"):
        torch.testing.assert_close(saved[key].double(), average[key], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(saved[key].double(), states[-1][key], atol=1e-6)
    scores = fastseg.evaluate(result.run_dir / "best.pt", pairs_dir / "images", pairs_dir / "masks", device="cpu")
    assert scores["images"] == 12


@pytest.mark.parametrize("recipe", ["fast", "tutorial"])
def test_the_optimizer_equals_torch(recipe):
    """Bit for bit, weights and state, also after its state was loaded."""
    settings = fastseg.Config(recipe=recipe, weight_decay=0.1)
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = make_optimizer(settings, models[0])
    groups = [
        {
            **group,
            "params": [models[1].weight if parameter.ndim > 1 else models[1].bias for parameter in group["params"]],
        }
        for group in ours.param_groups
    ]
    theirs = {"fast": torch.optim.AdamW, "tutorial": torch.optim.Adam}[recipe](groups)
    for step in range(4):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            torch.manual_seed(step)
            model(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 1:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)
    assert str(ours.state_dict()) == str(theirs.state_dict())


def test_muon_equals_torch():
    """On filters as matrices, which torch.optim.Muon takes; its arithmetic is bfloat16. AdamW has the rest."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    torch.manual_seed(0)
    settings = fastseg.Config(optimizer="muon", weight_decay=0.1, encoder_lr=0.5)
    model = fastseg.UNet(8, 2).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    filters = [name for name, p in model.named_parameters() if p.ndim == 4 and p.shape[2] == 3]
    matrices = {name: torch.nn.Parameter(other.get_parameter(name).detach().flatten(1).clone()) for name in filters}
    ours = make_optimizer(settings, model)
    assert sum(len(group["params"]) for group in ours.param_groups if group.get(MUON)) == len(filters) == 10
    set_learning_rate(ours, 0.01)
    rates = {id(p): group["lr"] for group in ours.param_groups for p in group["params"]}
    theirs = [
        torch.optim.Muon([matrices[name]], lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for name, rate in ((name, rates[id(model.get_parameter(name))]) for name in filters)
    ]
    assert {optimizer.param_groups[0]["lr"] for optimizer in theirs} == {0.01, 0.02}
    for step in range(3):
        torch.manual_seed(step)
        gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
            if name in matrices:
                matrices[name].grad = gradient.flatten(1)
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name in filters:
        found, before = model.get_parameter(name).flatten(1), other.get_parameter(name).flatten(1)
        assert (found - matrices[name]).norm() < 0.02 * (found - before).norm(), name


def test_orthogonalised_matrices_have_singular_values_about_one():
    torch.manual_seed(0)
    for shape in ((16, 27), (64, 288), (64, 9)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert 0.6 < values.min() < values.max() < 1.3, shape


@pytest.mark.parametrize("shape", [(16, 27), (64, 288), (64, 9), (48, 48)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-7])
def test_singular_values_are_those_of_the_polynomial(shape, smallest):
    """Each step of the Newton-Schulz iteration maps a singular value s to 3.4445 s - 4.775 s**3 + 2.0315 s**5."""
    torch.manual_seed(1)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    found = orthogonalise((u * values @ vh).float())
    assert ((u.T @ found.double() @ vh.T) - expected.diag()).norm() < 1e-3 * expected.norm()


@pytest.fixture
def falling_scores(monkeypatch):
    """Every epoch is scored lower than the one before it."""
    falling = iter(np.linspace(0.9, 0.1, 40).tolist())

    def score(*_):
        others = ("loss", "iou", "dice_pixels", "iou_pixels", "predicted", "foreground")
        return {**dict.fromkeys(others, 0.5), "dice": next(falling)}

    monkeypatch.setattr("fastseg.training.validate.score_batches", score)


@pytest.mark.usefixtures("falling_scores")
@pytest.mark.parametrize(("progressive_resizing", "epochs"), [(0.7, 17), (0.0, 3)])
def test_patience_begins_when_training_sees_the_full_size(pairs_dir, tmp_path, progressive_resizing, epochs):
    """Two epochs after the first score at full size, the fifteenth, or two after the first."""
    changes = {"num_epochs": 20, "early_stopping": 2, "progressive_resizing": progressive_resizing}
    result = fastseg.train(config(pairs_dir, tmp_path, **changes))
    assert len(result.history) == epochs


@pytest.mark.usefixtures("falling_scores")
def test_patience_does_not_end_a_longer_run_on_the_small_images_to_which_it_returns(pairs_dir, tmp_path):
    """Best is epoch 8, the first of three at full size of 10; of 30 epochs, 21 are small, and one more is enough."""
    changes = {"early_stopping": 3, "progressive_resizing": 0.7}
    fastseg.train(config(pairs_dir, tmp_path, num_epochs=10, **changes))
    result = fastseg.train(config(pairs_dir, tmp_path, num_epochs=30, **changes))
    sizes = [entry["val_size"] == 32 for entry in result.history]
    assert sizes == [False] * 7 + [True] * 3 + [False] * 11 + [True]


@pytest.mark.parametrize(("recipe", "optimizer"), [("fast", "adamw"), ("fast", "muon"), ("tutorial", "auto")])
def test_the_encoder_learns_at_its_own_rate(recipe, optimizer):
    model = fastseg.UNet(4, 2)
    encoder = {id(p) for part in (model.encoder, model.bottleneck) for p in part.parameters()}
    rates = []
    for encoder_lr in (1.0, 0.1):
        config = fastseg.Config(recipe=recipe, optimizer=optimizer, encoder_lr=encoder_lr)
        made = make_optimizer(config, model)
        set_learning_rate(made, 0.5)
        rates.append({id(p): group["lr"] for group in made.param_groups for p in group["params"]})
        assert rates[-1].keys() == {id(p) for p in model.parameters()}
        assert sum(len(group["params"]) for group in made.param_groups) == len(rates[-1])
    assert set(rates[0].values()) == ({0.5, 1.0, 8.0} if optimizer == "muon" else {0.5})
    for key, rate in rates[1].items():
        assert rate == pytest.approx((0.1 if key in encoder else 1) * rates[0][key])


def test_a_run_of_an_older_version_keeps_its_optimizer(pairs_dir, tmp_path):
    """Its last.pt does not say which: there was AdamW alone."""
    run = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, optimizer="adamw"))
    state = torch.load(run.run_dir / "last.pt", weights_only=True)
    del state["config"]["optimizer"]
    torch.save(state, run.run_dir / "last.pt")
    resumed = fastseg.train(config(pairs_dir, tmp_path, num_epochs=2))
    assert len(resumed.history) == 2
    assert torch.load(run.run_dir / "last.pt", weights_only=True)["config"]["optimizer"] == "adamw"
    new = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, name="new"))
    assert torch.load(new.run_dir / "last.pt", weights_only=True)["config"]["optimizer"] == "muon"
    tutorial = fastseg.train(config(pairs_dir, tmp_path, num_epochs=1, name="tutorial", recipe="tutorial"))
    assert fastseg.Config.from_json(tutorial.run_dir / "config.json").optimizer == "auto"  # it has Adam


def test_a_frozen_encoder_does_not_change(pairs_dir, tmp_path):
    """Until the given step; only its batch statistics follow the images."""
    torch.manual_seed(0)
    first = fastseg.UNet(4, 2)
    names = [name for name, _ in first.named_parameters() if name.startswith(("encoder", "bottleneck"))]
    for steps, frozen in ((3, False), (4, True)):  # of 4 steps
        run = fastseg.train(config(pairs_dir, tmp_path, name=str(steps), freeze_encoder=steps))
        last = weights(run.run_dir / "last.pt")
        assert same({n: last[n] for n in names}, {n: first.state_dict()[n] for n in names}) == frozen
        assert not torch.equal(last["head.weight"], first.state_dict()["head.weight"])


def test_an_encoder_is_asked_for(pairs_dir, tmp_path):
    for field, value in (("encoder_lr", 0.1), ("freeze_encoder", 5)):
        with pytest.raises(fastseg.ConfigError, match=rf"^{field}: .*encoder"):
            fastseg.train(config(pairs_dir, tmp_path, **{field: value}), network=torch.nn.Conv2d(3, 1, 1))


def test_biases_of_batch_norms_are_found_on_several_gpus_too():
    """There torch's SyncBatchNorm takes their place, which is no BatchNorm2d."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4, affine=False)
    )
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert norm_biases_of(synced) == {synced[1].bias}


def test_images_as_low_as_two_cells_have_one_size():
    """Epochs are told apart by the height of their images."""
    low = fastseg.Config(image_height=32, image_width=512, depth=4)
    assert training_size(low, 0, 100) == (32, 512)
