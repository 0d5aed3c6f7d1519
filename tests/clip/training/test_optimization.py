"""Optimizers, schedules and the moving average."""

import dataclasses
import math

import pytest
import torch
from open_clip_train import scheduler
from training_runs import SHORT, run

from experiments.clip.errors import Interrupted, UserError
from experiments.clip.training.methods import OpenCLIP
from experiments.clip.training.optimization import (
    LossScale,
    MovingAverage,
    build_optimizer,
    learning_rate,
    step_if,
)
from experiments.clip.training.options import Optimization


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lamb", "adan", "sgd"])
def test_optimizers_that_count_elsewhere_are_resumed(optimizer, pairs, tmp_path):
    optimization = dataclasses.replace(SHORT, optimizer=optimizer)
    whole, *_ = run(pairs, OpenCLIP(), tmp_path / "a", optimization=optimization)
    left = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization, stop=lambda: next(left))
    again, *_ = run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.slow
def test_the_moving_average_is_that_of_the_weights_and_is_resumed(pairs, tmp_path):
    optimization = dataclasses.replace(SHORT, ema=0.9, clip_norm=0.5)
    _, _, whole = run(pairs, OpenCLIP(), tmp_path / "a", optimization=optimization)
    left = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization, stop=lambda: next(left))
    clip, _, again = run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization)
    assert whole.keys() == again.keys() == clip.model.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    moved = [torch.equal(whole[key], value) for key, value in clip.model.state_dict().items()]
    assert not all(moved)
    # Against its definition, on two steps of one number.
    average = MovingAverage({"w": torch.tensor(0.0)}, 0.9)
    average.update({"w": torch.tensor(1.0)}, torch.tensor(True))
    assert float(average.average["w"]) == pytest.approx(0.9)  # the first decay is 1 / 10
    average.update({"w": torch.tensor(7.0)}, torch.tensor(False))
    assert float(average.average["w"]) == pytest.approx(0.9)
    average.update({"w": torch.tensor(0.0)}, torch.tensor(True))
    assert float(average.average["w"]) == pytest.approx(0.9 * 2 / 11)


def test_the_moving_average_of_many_tensors_is_that_of_each_one():
    torch.manual_seed(0)
    steps = [
        {"a": torch.randn(7, 5), "b": torch.randn(()), "half": torch.randn(9).half(), "count": torch.tensor(step)}
        for step in range(5)
    ]
    together, own = MovingAverage(steps[0], 0.99), {key: value.clone() for key, value in steps[0].items()}
    own["half"] = own["half"].float()
    for step, weights in enumerate(steps[1:]):
        together.update(weights, torch.tensor(True))
        for key in ("a", "b", "half"):
            own[key].lerp_(weights[key].float(), 1 - min(0.99, (1 + step) / (10 + step)))
        own["count"] = weights["count"]
    assert together.average.keys() == own.keys()
    torch.testing.assert_close(together.average, own, rtol=1e-6, atol=1e-7)
    assert together.average["half"].dtype == torch.float32
    kept = {key: value.clone() for key, value in together.state_dict().items()}
    together.update(steps[0], torch.tensor(False))  # of a step that was not taken
    assert all(torch.equal(value, kept[key]) for key, value in together.state_dict().items())


def test_schedules():
    cosine = Optimization(lr=1.0, warmup=4, lr_min=0.1)
    assert [learning_rate(step, 24, cosine) for step in (0, 3, 4, 14)] == pytest.approx([0.25, 1.0, 1.0, 0.55])
    assert learning_rate(24, 24, cosine) == pytest.approx(0.1)
    cooldown = Optimization(lr=1.0, warmup=0, schedule="cooldown", cooldown_steps=4)
    assert [learning_rate(step, 20, cooldown) for step in (0, 16, 18, 19)] == pytest.approx([1.0, 1.0, 0.5, 0.25])
    assert learning_rate(19, 20, Optimization(lr=1.0, warmup=0, schedule="constant")) == 1.0


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (Optimization(lr=2e-3, warmup=30), lambda own: scheduler.cosine_lr(own, 2e-3, 30, 100)),
        (
            Optimization(lr=1e-3, warmup=10, schedule="cooldown", cooldown_steps=40, cooldown_power=2.0, lr_min=1e-4),
            lambda own: scheduler.const_lr_cooldown(own, 1e-3, 10, 100, 40, 2.0, 1e-4),
        ),
        (
            Optimization(lr=1e-3, warmup=0, schedule="cooldown", cooldown_steps=7),
            lambda own: scheduler.const_lr_cooldown(own, 1e-3, 0, 100, 7),
        ),
        (Optimization(lr=1e-3, warmup=5, schedule="constant"), lambda own: scheduler.const_lr(own, 1e-3, 5, 100)),
    ],
    ids=["cosine", "cooldown", "linear cooldown", "constant"],
)
def test_schedules_are_those_of_open_clip(options, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = theirs(optimizer)
    expected = [rate(step) or optimizer.param_groups[0]["lr"] for step in range(100)]
    assert [learning_rate(step, 100, options) for step in range(100)] == pytest.approx(expected, rel=1e-12)


def test_optimizers_of_timm_are_given_what_they_have():
    model = torch.nn.Linear(3, 2)
    for more, expected in (
        ({"optimizer": "lion", "betas": (0.9, 0.95)}, {"betas": (0.9, 0.95)}),
        ({"optimizer": "lion"}, {"betas": (0.9, 0.99)}),
        ({"optimizer": "lamb", "adam_eps": 1e-5}, {"eps": 1e-5}),
        ({"optimizer": "sgd", "momentum": 0.5}, {"momentum": 0.5}),
        ({"optimizer": "sgd"}, {"momentum": 0.9}),
        ({"betas": (0.8, 0.9), "adam_eps": 1e-4}, {"betas": (0.8, 0.9), "eps": 1e-4}),
    ):
        defaults = build_optimizer(model, Optimization(lr=0.1, **more)).defaults
        assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": "lion", "adam_eps": 1e-5}, "--optimizer lion has no eps: leave out 1e-05"),
        ({"optimizer": "sgd", "betas": (0.9, 0.9)}, r"--optimizer sgd (has no|does not take)"),
        ({"optimizer": "adam", "momentum": 0.5}, "--optimizer adam has no momentum: leave out 0.5"),
        ({"optimizer": "adan", "betas": (0.9, 0.9)}, "--optimizer adan does not take"),
    ],
)
def test_what_an_optimizer_would_pass_over_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(torch.nn.Linear(3, 2), Optimization(lr=0.1, **more))


@pytest.mark.slow
def test_a_timm_optimizer_trains(pairs, tmp_path):
    optimization = dataclasses.replace(SHORT, optimizer="lion", lr=1e-4)
    whole, *_ = run(pairs, OpenCLIP(), tmp_path / "a", optimization=optimization)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization, stop=lambda: next(left))
    again, *_ = run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_step_that_is_not_wanted_is_left_out_without_a_trace(name):
    """Of two optimizers, one sees gradients that are not finite in between."""
    options = Optimization(optimizer=name, lr=0.1)
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, options) for model in models]
    for step, wanted in enumerate((True, False, True)):
        for model, optimizer in list(zip(models, optimizers, strict=True))[: 1 + wanted]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, step + 1.0 if wanted else torch.nan)
            step_if(optimizer, torch.tensor(wanted))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for key, values in states[0].items():
        assert all(torch.equal(torch.as_tensor(values[name]), torch.as_tensor(states[1][key][name])) for name in values)


def test_the_loss_scale_is_that_of_torch(monkeypatch):
    """Over steps with and without a finite gradient, in one of which the loss is not finite, which changes nothing."""
    monkeypatch.setattr(LossScale, "_STEPS", 3)
    scale = LossScale(True, torch.device("cpu"))
    grad_scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, True, True, False, True, True, False, False, True, True, True, True):
        value = 1.0 if finite else math.inf
        weight.grad = value * grad_scaler.scale(torch.ones(2))
        ours = [weight.grad.clone()]
        scale.unscale(ours)
        assert ours[0].tolist() == [value, value]
        grad_scaler.step(optimizer)
        grad_scaler.update()
        scale.update(torch.tensor(True), torch.tensor(finite))
        scale.update(torch.tensor(False), torch.tensor(False))
        assert float(scale.scale) == grad_scaler.get_scale()
    assert LossScale(False, torch.device("cpu")).scale == 1.0 and not LossScale(False, torch.device("cpu")).state_dict()
