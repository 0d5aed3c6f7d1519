"""The loop and its methods on real pairs: what a step computes, and stopping without loss."""

import dataclasses
import errno
import json
import math
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drrho import KL, penalized_risk
from experiments.clip.cli.building import build_method, build_selector
from experiments.clip.cli.parser import parse
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.source import glyph_features
from experiments.clip.glyphs.stream import MemoryStream, PreparedPairs, epoch_order
from experiments.clip.io import files
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.export import export_model
from experiments.clip.reference.inputs import CachedReference
from experiments.clip.training import checkpoint as checkpoint_module
from experiments.clip.training.checkpoint import Checkpoint, CheckpointWriter, latest_checkpoint
from experiments.clip.training.logs import Logs
from experiments.clip.training.methods import ConstantTemperature, Distilled, GlobalContrastive, Head, OpenCLIP, SigLIP
from experiments.clip.training.optimization import MovingAverage, Optimization, learning_rate
from experiments.clip.training.trainer import CheckpointPolicy, Execution, Interrupted, best_record, train

SELDOM = CheckpointPolicy(checkpoint_minutes=1e9)
SHORT = Optimization(epochs=2, batch_size=32, lr=1e-3, warmup=2)


@pytest.fixture(scope="module")
def pairs(manifest):
    return PreparedPairs(manifest, "train", new_model("glyph-small", 0))


@pytest.fixture(scope="module")
def features(manifest, reference, tmp_path_factory):
    return glyph_features(reference, manifest, tmp_path_factory.mktemp("features"))


HEAD = Head(torch.tensor(1.0))


def contrastive(samples=150, epochs=2):
    return GlobalContrastive(samples, epochs - 1, ConstantTemperature(0.1), final_gamma=0.6, eps=1e-8)


def run(
    pairs,
    method,
    checkpoints,
    features=None,
    stop=int,
    optimization=SHORT,
    seed=0,
    limit=0,
    keeping=SELDOM,
    validate=dict,
    validations=2,
    on_step=lambda step, total, log: None,
    selector=None,
    patch_dropout=0.0,
    clip=None,
    **options,
):
    sigmoid = isinstance(method, SigLIP)
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    if clip is None:
        clip = new_model("glyph-small", seed, sigmoid=sigmoid, force_patch_dropout=patch_dropout)
    history, average = train(
        clip,
        method,
        MemoryStream(
            pairs, optimization.batch_size * (selector.candidates if selector else 1), seed, features=features
        ),
        optimization,
        reference_model=None if features is None else CachedReference(features),
        selector=selector,
        ranks=Ranks(),
        execution=Execution(**options),
        seed=seed,
        checkpoints=checkpoints,
        keeping=keeping,
        settings={"method": type(method).__name__, "seed": seed},
        validate=validate,
        validations=validations,
        logs=Logs(checkpoints.parent, ("jsonl",), {}),
        log_every=3,
        on_step=on_step,
        stop=stop,
        nonfinite_limit=limit,
    )
    return clip, history, average


@torch.no_grad()
def test_steered_loss_is_the_penalized_risk_of_excess_losses_of_the_right_samples(manifest, reference, features):
    """The demo's loss, from model to reference to sample index, against the core: one anchor at a time, float64."""
    clip = new_model("glyph-small", 0)
    samples = list(read_samples(manifest, "train"))
    index = torch.tensor([5, 64, 149, 0, 63])
    images = torch.stack([clip.preprocess(samples[k].image) for k in index.tolist()])
    captions = [samples[k].caption for k in index.tolist()]
    image, text = clip.encode_image(images).double(), clip.encode_text(captions).double()
    tau = 0.1
    rows = [features.rows(torch.tensor([k])) for k in index.tolist()]
    guided = CachedReference(features).features(features.rows(index), torch.device("cpu"))
    loss = contrastive(len(samples)).loss((image, text), index, HEAD, 0, guided)

    ref_image, ref_text = (torch.cat(part).double() for part in zip(*rows, strict=True))
    views = torch.stack([reference.preprocess(samples[k].image) for k in index.tolist()])
    assert torch.allclose(ref_image, reference.encode_image(views).double(), rtol=0, atol=1e-3)
    assert torch.allclose(ref_text, reference.encode_text(captions).double(), rtol=0, atol=1e-3)
    risks = []
    for a, b, ra, rb in ((image, text, ref_image, ref_text), (text, image, ref_text, ref_image)):
        for i in range(len(index)):
            others = [j for j in range(len(index)) if j != i]
            target = a[i] @ b[others].T - a[i] @ b[i]
            guide = ra[i] @ rb[others].T - ra[i] @ rb[i]
            risks.append(penalized_risk(target - guide, KL(), tau).value)
    assert abs(loss.value - torch.stack(risks).mean()) <= 1e-10


def test_estimates_belong_to_the_samples_of_the_batch():
    method = contrastive()
    image, text = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    method.loss((image, text), torch.tensor([7, 149, 20]), HEAD, 0, None)
    visited = torch.isfinite(method.state_dict()["running.log_u"]).all(0).nonzero().flatten()
    assert visited.tolist() == [7, 20, 149]


CHOSEN = ("--candidates", "2", "--select")
FASTCLIP = ("--method", "fastclip", "--temperature", "0.1")
SETTINGS = {
    "openclip": ("--method", "openclip"),
    "siglip": ("--method", "siglip"),
    "fastclip v1": FASTCLIP,
    "fastclip v0": (*FASTCLIP, "--temperature-scheme", "per-temperature"),
    "fastclip v2": (*FASTCLIP, "--temperature-scheme", "individual", "--rho", "0.5"),
    "fastclip v3": (*FASTCLIP, "--temperature-scheme", "global", "--rho", "0.5"),
    "fastclip v3, as published": (
        *FASTCLIP,
        *("--temperature-scheme", "global", "--rho", "0.5", "--temperature-lr-schedule", "threshold"),
        *("--published-temperature-gradient", "--gamma-epochs", "1"),
    ),
    "fastclip with chi-square": (*FASTCLIP, "--divergence", "chi-square"),
    "fastclip with cvar": (*FASTCLIP, "--divergence", "cvar", "--level", "0.2"),
    "scent": (*FASTCLIP, "--log-step", "0.5"),
    "drrho": (),
    "drrho, adaptive": ("--coefficient", "adaptive"),
    "drrho and distillation": ("--distill", "0.5"),
    "openclip and distillation": ("--method", "openclip", "--distill", "1"),
    "drrho and distillation, each at its temperature": ("--distill", "0.5", "--distill-own-temperature"),
    "openclip and distillation, each at its temperature": (
        *("--method", "openclip", "--distill", "1", "--distill-own-temperature"),
    ),
    "two levels": ("--method", "two-level"),
    "openclip on jest": (
        "--method",
        "openclip",
        *CHOSEN,
        "jest",
        "--select-chunks",
        "4",
        "--select-temperature",
        "0.5",
    ),
    "siglip on jest": ("--method", "siglip", *CHOSEN, "jest", "--select-chunks", "4"),
    "siglip on jest top-k": ("--method", "siglip", *CHOSEN, "jest-top-k", "--select-chunks", "7"),
    "fastclip v3 on jest top-k, and distillation": (
        *("--method", "fastclip", "--temperature-scheme", "global", "--rho", "0.5", "--distill", "0.5"),
        *(*CHOSEN, "jest-top-k", "--select-chunks", "4"),
    ),
    "drrho on rho top-k": (*CHOSEN, "rho-top-k"),
    "two levels on rho top-k": ("--method", "two-level", *CHOSEN, "rho-top-k"),
}


def built(name, pairs, features, reference, optimization=SHORT):
    """Return what `run` needs for these settings, anew; a step visits as many pairs as without selection."""
    options = parse(["train", *SETTINGS[name]])
    guide = (reference, CachedReference(features)) if options.needs_reference else (None, None)
    scored = options.selection.scored_per_pair
    return {
        "method": build_method(options.loss, optimization.epochs, len(pairs), *guide, Ranks())[0],
        "features": features if options.needs_reference else None,
        "selector": build_selector(options, guide[0], Ranks()),
        "optimization": dataclasses.replace(optimization, batch_size=optimization.batch_size // scored),
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_anywhere_and_resumed_ends_at_the_same_bits(name, pairs, features, reference, tmp_path):
    """Every method, as the command line builds it."""
    given = (pairs, features, reference)
    whole, history, _ = run(pairs, checkpoints=tmp_path / "whole" / "c", **built(name, *given))
    checkpoint = tmp_path / "parts" / "c"
    for steps in (3, 4):
        left = iter([False] * (steps - 1) + [True])
        with pytest.raises(Interrupted, match="of 10"):
            run(pairs, checkpoints=checkpoint, stop=lambda left=left: next(left), **built(name, *given))
    resumed, again, _ = run(pairs, checkpoints=checkpoint, **built(name, *given))
    assert again == history
    trained = [75, 150] if "on" in name.split() else [150, 300]
    assert [(r["samples_scored"], r["samples_trained"]) for r in history] == list(zip([150, 300], trained, strict=True))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert all(math.isfinite(value) for record in history for value in record.values())


@pytest.mark.parametrize("name", ["drrho", "siglip", "drrho on rho top-k"])
def test_a_batch_in_parts_takes_the_same_steps(name, pairs, features, reference, tmp_path):
    ends = []
    for parts in (1, 3):
        optimization = Optimization(epochs=1, batch_size=32, lr=1e-3, warmup=2, accumulation=parts)
        given = built(name, pairs, features, reference, optimization)
        clip, history, _ = run(pairs, checkpoints=tmp_path / f"{parts}", **given)
        ends.append((history[-1]["loss"], torch.cat([value.flatten() for value in clip.model.state_dict().values()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert (ends[0][1] - ends[1][1]).abs().max() <= 2e-4  # a fifth of one step of Adam


def test_dropped_patches_of_candidates_and_parts_resume_at_the_same_bits(pairs, features, reference, tmp_path):
    options = {"patch_dropout": 0.5, "precision": "bfloat16", "activation_checkpointing": True}
    optimization = dataclasses.replace(SHORT, accumulation=2)
    given = ("openclip on jest", pairs, features, reference, optimization)
    whole, history, _ = run(pairs, checkpoints=tmp_path / "a" / "c", **built(*given), **options)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, checkpoints=tmp_path / "b" / "c", stop=lambda: next(left), **built(*given), **options)
    again, resumed, _ = run(pairs, checkpoints=tmp_path / "b" / "c", **built(*given), **options)
    assert resumed == history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_a_model_with_a_sigmoid_head_is_exported_with_it(pairs, tmp_path):
    clip, *_ = run(pairs, SigLIP(), tmp_path / "c")
    export_model(clip, tmp_path / "model")
    again = load_model(tmp_path / "model").model
    assert torch.equal(again.logit_bias, clip.model.logit_bias)
    assert float(again.logit_bias.detach()) != -10.0


def test_distillation_has_one_temperature_or_each_softmax_its_own():
    generator = torch.Generator().manual_seed(0)
    image, text, image_guide, text_guide = (
        torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64)) for _ in range(4)
    )
    head, index, guide_tau = Head(torch.tensor(8.0, dtype=torch.float64, requires_grad=True)), torch.arange(6), 0.3

    def cross_entropy(tau):
        target, guide = image @ text.T / tau, image_guide @ text_guide.T / guide_tau
        return (
            -sum((b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in ((target, guide), (target.T, guide.T))) / 2
        )

    own = image, text
    for is_own, tau in ((False, guide_tau), (True, 1 / head.scale)):
        method = Distilled(OpenCLIP(), 2.0, guide_tau, own=is_own)
        loss = method.loss(own, index, head, 0, (image_guide, text_guide)).value
        expected = OpenCLIP().loss(own, index, head, 0, None).value + 2 * cross_entropy(tau)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        found, wanted = (torch.autograd.grad(value, head.scale)[0].item() for value in (loss, expected))
        assert found == pytest.approx(wanted, rel=1e-9)
    steered = contrastive(6)
    tau, _ = steered.logits_at(head)
    loss = Distilled(steered, 2.0, guide_tau, own=True).loss(own, index, head, 0, (image_guide, text_guide))
    assert loss.log["distillation"] == pytest.approx(cross_entropy(tau).item(), rel=1e-12)


def test_training_lowers_the_loss(pairs, tmp_path):
    _, history, _ = run(
        pairs,
        contrastive(len(pairs), 12),
        tmp_path / "c",
        optimization=Optimization(epochs=12, batch_size=32, lr=2e-3, warmup=5),
    )
    assert history[-1]["loss"] < history[0]["loss"] - 0.01


def test_checkpoint_of_other_settings_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    with pytest.raises(UserError, match="method=OpenCLIP, now it is GlobalContrastive"):
        run(pairs, contrastive(len(pairs)), tmp_path / "c")
    with pytest.raises(UserError, match="seed=0, now it is 1"):
        run(pairs, OpenCLIP(), tmp_path / "c", seed=1)


def test_damaged_checkpoint_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    found = latest_checkpoint(tmp_path / "c")
    part = found / "part-0-of-1.safetensors"
    data = part.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[8:]):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            run(pairs, OpenCLIP(), tmp_path / "c")
    part.unlink()
    with pytest.raises(UserError, match="damaged"):
        Checkpoint(found)


def test_checkpoint_of_another_version_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    [part] = latest_checkpoint(tmp_path / "c").iterdir()
    with safe_open(part, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    del metadata["format"]
    save_file(tensors, tmp_path / "older", metadata)
    (tmp_path / "older").replace(part)
    with pytest.raises(UserError, match="has format None, this program reads 1"):
        run(pairs, OpenCLIP(), tmp_path / "c")


def test_a_folder_that_is_moved_while_a_checkpoint_is_made_is_named(tmp_path):
    writer = CheckpointWriter(tmp_path / "c", {}, Ranks(), keep=2)
    writer.start({"weight": torch.zeros(3)}, {}, {}, {"step": 1})
    while writer.is_writing:
        time.sleep(0.01)
    (tmp_path / "c").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"cannot write .*step-00000001 .*has disappeared"):
        writer.settle()
    (tmp_path / "c").write_text("")
    writer.start({"weight": torch.zeros(3)}, {}, {}, {"step": 2})
    with pytest.raises(UserError, match=r"cannot write .*(Not a directory|File exists)"):
        writer.settle()


def test_checkpoints_are_whole_and_the_last_two_are_kept(pairs, tmp_path):
    def interrupted(steps):
        left = iter([False] * (steps - 1) + [True])
        with pytest.raises(Interrupted):
            run(pairs, contrastive(len(pairs)), tmp_path / "c", stop=lambda: next(left))

    for steps in (2, 1, 3):
        interrupted(steps)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000003", "step-00000006"]
    # One that was not finished counts for nothing.
    (tmp_path / "c" / ".partial-step-00000009").mkdir()
    assert latest_checkpoint(tmp_path / "c").name == "step-00000006"
    run(pairs, contrastive(len(pairs)), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000006", "step-00000010"]
    run(pairs, contrastive(len(pairs)), tmp_path / "c")  # nothing is left to do; its last step is written again
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000006", "step-00000010"]
    files = {path.name for path in latest_checkpoint(tmp_path / "c").iterdir()}
    assert files == {"part-0-of-1.safetensors"}


def test_checkpoints_by_steps_and_the_best_are_kept(pairs, tmp_path):
    """Accuracies rise and fall: the highest one's checkpoint stays beside the last, also after an interruption."""
    scores = iter([0.1, 0.7, 0.3, 0.7, 0.2])
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=3, keep=1, best="accuracy")
    left = iter([False] * 6 + [True])

    def validated(**options):
        return run(
            pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, **options
        )

    with pytest.raises(Interrupted):
        validated(validations=5, stop=lambda: next(left))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000007"]
    _, history, _ = validated(validations=5)
    assert [record["accuracy"] for record in history] == [0.1, 0.7, 0.3, 0.7, 0.2]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000010"]
    assert best_record(history, "accuracy") is history[1]
    with pytest.raises(
        UserError, match=r"--best recall is no metric of the validations: choose one of step, samples_scored"
    ):
        run(pairs, OpenCLIP(), tmp_path / "c", keeping=dataclasses.replace(keeping, best="recall"))


def test_training_goes_on_while_a_checkpoint_is_written(pairs, tmp_path, monkeypatch):
    """Writing is held up until three more steps are done: state is that of the step at which it began."""
    steps: list[int] = []
    saves = checkpoint_module.save_file

    def slowly(*arguments):
        begun = len(steps)
        while len(steps) < min(begun + 3, 9):
            time.sleep(0.01)
        saves(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_file", slowly)
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=4)

    def on_step(step, total, log):
        steps.append(step)
        time.sleep(0.02)

    left = iter([False] * 8 + [True])
    with pytest.raises(Interrupted):
        run(pairs, contrastive(len(pairs)), tmp_path / "c", keeping=keeping, on_step=on_step, stop=lambda: next(left))
    monkeypatch.undo()
    plain, *_ = run(pairs, contrastive(len(pairs)), tmp_path / "plain")
    (tmp_path / "c" / "step-00000009").rename(tmp_path / "aside")
    assert latest_checkpoint(tmp_path / "c").name == "step-00000008"
    resumed, *_ = run(pairs, contrastive(len(pairs)), tmp_path / "c")
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_checkpoint_is_published_whatever_the_disk_says_of_its_folder(pairs, tmp_path, monkeypatch):
    """Syncing the folder fails once after the rename; then a process ends between the renames of a step made again."""
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    synced, failures = checkpoint_module.sync, [OSError(errno.EIO, "Input/output error")]

    def failing(path):
        if path.name == "c" and failures:
            raise failures.pop()
        synced(path)

    monkeypatch.setattr(checkpoint_module, "sync", failing)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "c", stop=lambda: next(left))
    assert not failures and [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000004"]
    (tmp_path / "c" / "step-00000004").rename(tmp_path / "c" / ".partial-old-step-00000004")
    (tmp_path / "c" / ".partial-step-00000004").mkdir()
    steps: list[int] = []
    run(pairs, OpenCLIP(), tmp_path / "c", on_step=lambda step, total, log: steps.append(step))
    assert steps == [5, 6, 7, 8, 9, 10]


def test_a_read_that_fails_for_a_while_is_no_damage(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    run(pairs, OpenCLIP(), tmp_path / "c")
    opens, failures = checkpoint_module.safe_open, [5, 116]

    def failing(*arguments):
        if failures:
            raise SafetensorError(f"I/O error: what it says (os error {failures.pop()})")
        return opens(*arguments)

    monkeypatch.setattr(checkpoint_module, "safe_open", failing)
    run(pairs, OpenCLIP(), tmp_path / "c")
    failures.extend([5] * 100)
    with pytest.raises(UserError, match=r"cannot read checkpoint .* \(Input/output error\): check the storage"):
        run(pairs, OpenCLIP(), tmp_path / "c")


def test_the_best_of_an_older_checkpoint_stays_as_long_as_it_does(pairs, tmp_path):
    scores = iter([0.5, 0.1, 0.2, 0.3, 0.9])
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=3, keep=2, best="accuracy")
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, validations=5)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-00000002", "step-00000009", "step-00000010"]  # 2 is the best of 9
    (tmp_path / "c" / "step-00000010").rename(tmp_path / "aside")
    scores = iter([0.9])
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, validations=5)


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


def test_parameters_without_gradients_are_resumed(pairs, tmp_path):
    """A model with a bias that the method does not use: the optimizer has no state of it."""

    def start(folder, stop=int):
        clip = new_model("glyph-small", 0, sigmoid=True)
        return run(pairs, OpenCLIP(), folder, clip=clip, stop=stop)[0]

    left = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        start(tmp_path / "b", lambda: next(left))
    whole, again = start(tmp_path / "a"), start(tmp_path / "b")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize("number, attempts", [(errno.EIO, 6), (errno.ENOSPC, 1)])
def test_a_disk_that_fails_for_a_while_or_for_good(number, attempts, pairs, tmp_path, monkeypatch):
    """Errors of a network file system are waited for; a full disk ends the run, and earlier checkpoints stay."""
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    failures: list[int] = []
    saves = checkpoint_module.save_file

    def failing(*arguments):
        if failures:
            raise SafetensorError(f"Error while serializing: I/O error: what it says (os error {failures.pop()})")
        saves(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_file", failing)
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=4)

    def at_step(step, total, log):
        failures.extend([number] * 50 * (step == 7))

    with pytest.raises(UserError, match=r"cannot write .*part-0-of-1.safetensors( after 6 attempts)? \("):
        run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, on_step=at_step)
    assert len(failures) == 50 - attempts
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000004"]
    failures[:] = [errno.EIO] * 3
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping)
    assert not failures
    assert latest_checkpoint(tmp_path / "c").name == "step-00000010"


@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"precision": "float16"}, {"activation_checkpointing": True}]
)
def test_towers_in_other_precisions_stay_near_float32(options, pairs, features, tmp_path):
    _, history, _ = run(pairs, contrastive(len(pairs)), tmp_path / "a", features)
    found, other, _ = run(pairs, contrastive(len(pairs)), tmp_path / "b", features, **options)
    tolerance = 0.05 if "precision" in options else 1e-5
    assert other[-1]["loss"] == pytest.approx(history[-1]["loss"], abs=tolerance * abs(history[0]["loss"]))
    assert all(value.dtype == torch.float32 for value in found.model.state_dict().values() if value.is_floating_point())


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
    average.update({"w": torch.tensor(1.0)})
    assert float(average.average["w"]) == pytest.approx(0.9)  # the first decay is 1 / 10
    average.update({"w": torch.tensor(0.0)})
    assert float(average.average["w"]) == pytest.approx(0.9 * 2 / 11)


def test_schedules():
    cosine = Optimization(lr=1.0, warmup=4, lr_min=0.1)
    assert [learning_rate(step, 24, cosine) for step in (0, 3, 4, 14)] == pytest.approx([0.25, 1.0, 1.0, 0.55])
    assert learning_rate(24, 24, cosine) == pytest.approx(0.1)
    cooldown = Optimization(lr=1.0, warmup=0, schedule="cooldown", cooldown_steps=4)
    assert [learning_rate(step, 20, cooldown) for step in (0, 16, 18, 19)] == pytest.approx([1.0, 1.0, 0.5, 0.25])
    assert learning_rate(19, 20, Optimization(lr=1.0, warmup=0, schedule="constant")) == 1.0


def test_the_log_says_what_steering_rests_on(pairs, features, tmp_path):
    run(pairs, contrastive(len(pairs)), tmp_path / "c", features)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert [line["step"] for line in steps] == [3, 6, 9, 10]
    for line in steps:
        for name in ("variance_of_losses", "variance_of_excess"):
            assert 0 < line[f"{name}/image"] and 0 < line[f"{name}/text"]
            assert line[name] == pytest.approx((line[f"{name}/image"] + line[f"{name}/text"]) / 2)
        assert -1 <= line["correlation_with_reference"] <= 1
        assert 1 <= line["effective_negatives"] <= 29
        assert line["pairs_per_second_per_rank"] > 0
        assert 0 <= line["share_of_time_waiting_for_data"] <= 1
        assert line["gradient_norm"] > 0
    assert [line["samples_trained"] for line in steps] == [90, 180, 270, 300]
    assert sum("validation/loss" in line for line in lines) == 2


def test_a_timm_optimizer_trains(pairs, tmp_path):
    optimization = dataclasses.replace(SHORT, optimizer="lion", lr=1e-4)
    whole, *_ = run(pairs, OpenCLIP(), tmp_path / "a", optimization=optimization)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization, stop=lambda: next(left))
    again, *_ = run(pairs, OpenCLIP(), tmp_path / "b", optimization=optimization)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_tensorboard_and_unknown_writers(pairs, tmp_path):
    logs = Logs(tmp_path, ("tensorboard",), {})
    logs.write(3, {"loss": 0.5})
    logs.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(UserError, match="--logs wandb needs the package wandb"):
        Logs(tmp_path, ("wandb",), {})


class Poisoned(PreparedPairs):
    """The pairs, of which sample 77 has an image that is not finite."""

    def __init__(self, pairs):
        self.__dict__ = pairs.__dict__

    def images(self, index):
        images = super().images(index)
        images[index == 77] = torch.inf
        return images


def test_a_step_that_is_not_finite_ends_the_run_or_is_passed_over_and_its_samples_are_written_down(pairs, tmp_path):
    poisoned = Poisoned(pairs)
    for name in "abd":
        (tmp_path / name).mkdir()
    (wrong,) = [k for k, batch in enumerate(epoch_order(150, 32, 0, 0)) if 77 in batch]
    with pytest.raises(
        UserError, match=f"the features are not finite at step {wrong}, whose samples are in .*nonfinite"
    ):
        run(poisoned, contrastive(), tmp_path / "a" / "c")
    (line,) = (tmp_path / "a" / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == epoch_order(150, 32, 0, 0)[wrong].tolist()
    clip, history, _ = run(poisoned, contrastive(), tmp_path / "b" / "c", limit=2)
    assert all(bool(torch.isfinite(value).all()) for value in clip.model.state_dict().values())
    assert len((tmp_path / "b" / "nonfinite.jsonl").read_text().splitlines()) == 2
    assert history[-1]["step"] == 10
    with pytest.raises(UserError, match="the features are not finite at step"):
        run(poisoned, contrastive(), tmp_path / "d" / "c", limit=1)
