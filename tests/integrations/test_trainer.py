"""Steering of transformers' Trainer and TRL's SFTTrainer: real trainers, models and collators, of a small size."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import EVERY
from processes import start_ranks

pytest.importorskip("transformers", reason="needs the extra integrations (make test-integrations)")
pytest.importorskip("trl", reason="needs the extra integrations (make test-integrations)")
pytestmark = pytest.mark.filterwarnings("default")  # hosts warn of their own deprecations

from integrations.hosts import classifier, decoder, labeled, sentences, tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer  # noqa: E402

from drrho import KL, ChiSquare, CVaR, constrained_risk, penalized_risk  # noqa: E402
from drrho.integrations import ReferenceLosses, Steering  # noqa: E402
from drrho.integrations.trainer import steered  # noqa: E402


def settings(folder, kind=TrainingArguments, **more):
    fixed = {"lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "save_strategy": "no"}
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1}
    if kind is SFTConfig:
        more = {"bf16": False, "max_length": 24, "dataset_num_proc": None} | more
    plain = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "disable_tqdm": True}
    return kind(output_dir=str(folder), **fixed | small | plain | more)


def with_trainer(folder, kind=Trainer, side="right", model=None, data=None, **more):
    collator = DataCollatorForSeq2Seq(tokenizer(side))
    return kind(
        model=model or decoder(),
        args=settings(folder, **more),
        train_dataset=data or sentences(),
        eval_dataset=sentences(8, seed=1),
        data_collator=collator,
    )


def with_sft(folder, kind=SFTTrainer, model=None, data=None, **more):
    return kind(
        model=model or decoder(),
        args=settings(folder, SFTConfig, **more),
        train_dataset=data or sentences(),
        eval_dataset=sentences(8, seed=1),
        processing_class=tokenizer(),
    )


HOSTS = {
    "padded right": (Trainer, with_trainer, {}),
    "padded left": (Trainer, with_trainer, {"side": "left"}),
    "sft": (SFTTrainer, with_sft, {}),
    "sft padding-free": (SFTTrainer, with_sft, {"padding_free": True, "max_length": None}),
    "sft packed": (SFTTrainer, with_sft, {"packing": True}),
    "sft wrapped": (SFTTrainer, with_sft, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
}
STEERED = {"divergence": KL(), "strength": 0.2}


def kind_of(host, **more):
    arguments = STEERED | {"reference": decoder(1)} | more
    return steered(HOSTS[host][0], arguments.pop("divergence"), **arguments)


def made(host, folder, kind=None, **more):
    original, make, arguments = HOSTS[host]
    return make(folder, kind or original, **arguments | more)


def trained(trainer):
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(curve), torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("host", HOSTS)
def test_without_a_radius_the_host_trains_as_ever(tmp_path, host, level):
    """Accumulation, padding, masks and packing enter as the host's own loss has them."""
    kind = kind_of(host, divergence=ChiSquare(), strength=None, radius=0.0, level=level)
    _, expected = trained(made(host, tmp_path))
    _, found = trained(made(host, tmp_path, kind))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("host", HOSTS)
def test_stored_losses_steer_as_the_model_beside(tmp_path, host, level):
    beside, expected = trained(made(host, tmp_path, kind_of(host, level=level)))
    trainer = made(host, tmp_path, kind_of(host, level=level, cache=tmp_path / "cache"))
    stored, found = trained(trainer)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7) and torch.allclose(stored, beside, rtol=1e-5)
    again = kind_of(host, level=level, reference=ReferenceLosses(tmp_path / "cache"))
    assert torch.allclose(trained(made(host, tmp_path, again))[1], found, rtol=1e-9)
    assert not torch.allclose(found, trained(made(host, tmp_path))[1], rtol=1e-3)


@pytest.mark.parametrize("host", ["padded left", "sft packed"])
def test_evaluation_is_the_host_s_own(tmp_path, host):
    plain, ours = made(host, tmp_path), made(host, tmp_path, kind_of(host, cache=tmp_path / "cache"))
    expected, found = plain.evaluate(), ours.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    ours.train()
    after = ours.evaluate()["eval_loss"]
    ours.compute_loss_func = None
    assert after == Trainer.evaluate(ours)["eval_loss"]


# --- against the core -------------------------------------------------------------------------------------------------


def by_hand(model, reference, batch, level):
    """Losses, reference losses and base weights of a batch, sequence by sequence."""
    rows = [[], []]
    for k, labels in enumerate(batch["labels"]):
        asked = (labels[1:] != -100).nonzero().flatten()
        for each, network in zip(rows, (model, reference), strict=True):
            logits = network(input_ids=batch["input_ids"][k : k + 1], attention_mask=batch["attention_mask"][k : k + 1])
            chances = logits.logits[0, :-1].log_softmax(-1)
            each.append(-chances[asked, labels[1:][asked]])
    counts = torch.tensor([len(part) for part in rows[0]], dtype=torch.float64)
    if level == "token":
        return torch.cat(rows[0]), torch.cat(rows[1]), None, counts.sum()
    means = [torch.stack([part.mean() for part in each]) for each in rows]
    return *means, counts / counts.sum(), counts.sum()


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory):
    """A steered trainer, one of its batches, its reference and the host's count of the step's tokens."""
    reference = decoder(1)
    trainer = with_trainer(tmp_path_factory.mktemp("one"), steered(Trainer, KL(), strength=1.0, reference=reference))
    trainer.model.train()
    return trainer, next(iter(trainer.get_train_dataloader())), reference


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_is_that_of_the_core(one_batch, name, level, monkeypatch):
    trainer, batch, reference = one_batch
    monkeypatch.setattr(trainer, "_steering", Steering(EVERY[name], radius=0.1, coefficient=0.8))
    monkeypatch.setattr(trainer, "_level", level)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(100))
    found = torch.autograd.grad(loss, list(trainer.model.parameters()))
    losses, theirs, base, count = by_hand(trainer.model, reference, batch, level)
    risk = constrained_risk(losses - 0.8 * theirs.detach(), EVERY[name], 0.1, base_weights=base)
    value = risk.value * count / 100
    expected = torch.autograd.grad(value, list(trainer.model.parameters()))
    assert torch.allclose(loss, value, rtol=1e-6)
    size = max(float(part.abs().max()) for part in expected)
    assert all(torch.allclose(f, e, rtol=1e-6, atol=1e-6 * size) for f, e in zip(found, expected, strict=True))
    assert torch.allclose(trainer.steering_step.weights, risk.weights.detach(), rtol=1e-6, atol=1e-9)


def test_cvar_of_excess_tokens_is_the_selection_of_rho_1(one_batch, monkeypatch):
    trainer, batch, reference = one_batch
    losses, theirs, _, count = by_hand(trainer.model, reference, batch, "token")
    monkeypatch.setattr(trainer, "_steering", Steering(CVaR(8 / float(count))))
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    chosen = (losses - theirs).topk(8).indices
    weights = trainer.steering_step.weights
    assert torch.allclose(weights[chosen], torch.tensor(1 / 8, dtype=torch.float64)) and weights.count_nonzero() == 8


# --- classification ---------------------------------------------------------------------------------------------------


def with_classifier(folder, kind=Trainer, data=None, model=None, **more):
    return kind(
        model=model or classifier(),
        args=settings(folder, **more),
        train_dataset=data or labeled(),
        eval_dataset=labeled(8, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer()),
    )


def in_one_part(folder, kind):
    """Without accumulation, on batches that are twice as large."""
    return trained(with_classifier(folder, kind, per_device_train_batch_size=8, gradient_accumulation_steps=1))


def test_classifiers_are_steered_by_sample(tmp_path):
    reference = classifier(1)
    zero = steered(Trainer, ChiSquare(), radius=0.0, reference=reference, level="sample")
    # With accumulation the host itself adds up the means of its parts.
    expected, found = (
        trained(with_classifier(tmp_path, kind, gradient_accumulation_steps=1)) for kind in (Trainer, zero)
    )
    assert torch.allclose(found[1], expected[1], rtol=1e-6, atol=1e-7)
    assert torch.allclose(
        trained(with_classifier(tmp_path, zero))[1], in_one_part(tmp_path, zero)[1], rtol=1e-6, atol=1e-7
    )
    beside = steered(Trainer, KL(), strength=0.1, reference=reference, level="sample")
    stored = steered(Trainer, KL(), strength=0.1, reference=reference, level="sample", cache=tmp_path / "cache")
    expected, found = (trained(with_classifier(tmp_path, kind)) for kind in (beside, stored))
    assert torch.allclose(found[1], expected[1], rtol=1e-6, atol=1e-7)
    trainer = with_classifier(tmp_path, beside)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))
    own, theirs = (
        torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
        for model in (trainer.model, reference)
    )
    assert torch.allclose(loss, penalized_risk(own - theirs, KL(), 0.1).value / 2, rtol=1e-6)


# --- ranks ------------------------------------------------------------------------------------------------------------


def on_rank(rank, world, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = {}
    for host in ("padded left", "sft"):
        for level in ("token", "sequence"):
            more = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "eval_strategy": "no"}
            cache = {"cache": f"{folder}/cache"} if host == "sft" else {}
            trainer = made(host, folder, kind_of(host, level=level, **cache), **more)
            found[host, level] = trained(trainer)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # processes that import the hosts
def test_ranks_weigh_their_samples_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(on_rank, (2, str(tmp_path), port), 2)
    for (host, level), (curve, weights) in torch.load(tmp_path / "0.pt").items():
        expected = trained(made(host, tmp_path, kind_of(host, level=level), per_device_train_batch_size=4))
        assert torch.allclose(weights, expected[1], rtol=1e-6, atol=1e-7)
        assert torch.allclose(curve, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # workers
def test_workers_look_the_losses_up(tmp_path):
    kind = kind_of("sft packed", cache=tmp_path / "cache")
    expected, found = (trained(made("sft packed", tmp_path, kind, dataloader_num_workers=count)) for count in (0, 2))
    assert torch.allclose(found[1], expected[1], rtol=1e-9)


def test_in_mixed_precision_the_host_trains_as_ever(tmp_path):
    zero = kind_of("padded left", divergence=ChiSquare(), strength=None, radius=0.0)
    curves = [
        trained(made("padded left", tmp_path, kind, model=decoder().float(), bf16=True))[1] for kind in (None, zero)
    ]
    assert torch.allclose(*curves, rtol=1e-3, atol=1e-4) and curves[0].dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------------------


@contextmanager
def refused(message):
    with pytest.raises(ValueError, match=message):
        yield


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False|liger"),
    ],
)
def test_settings_with_another_loss_are_refused(tmp_path, change, message):
    with pytest.raises((ValueError, ImportError), match=message):
        with_trainer(tmp_path, kind_of("padded right"), **change)


def test_several_devices_in_one_process_are_refused(tmp_path):
    arguments = settings(tmp_path)
    arguments._n_gpu = 2
    with refused("2 devices of one process would each weigh their own part"):
        kind_of("padded right")(model=decoder(), args=arguments, train_dataset=sentences())


def test_the_target_is_not_its_own_reference(tmp_path):
    model = decoder()
    with refused("reference must be another model than the target"):
        with_trainer(tmp_path, kind_of("padded right", reference=model), model=model)


def test_the_reference_is_left_trainable(tmp_path):
    reference = decoder(1)
    with_trainer(tmp_path, kind_of("padded right", reference=reference)).train()
    assert all(weight.requires_grad and weight.grad is None for weight in reference.parameters())


def test_a_loss_of_one_s_own_is_refused(tmp_path):
    with refused("compute_loss_func must be None"):
        kind_of("padded right")(
            model=decoder(), args=settings(tmp_path), train_dataset=sentences(), compute_loss_func=lambda *_: 0
        )


@pytest.mark.parametrize("stored", [False, True])
def test_another_vocabulary_is_refused(tmp_path, stored):
    reference = decoder(1, vocabulary=48)
    if stored:
        wide = with_trainer(
            tmp_path, kind_of("padded right", reference=reference, cache=tmp_path / "c"), model=decoder(vocabulary=48)
        )
        wide.get_train_dataloader()
        reference = ReferenceLosses(tmp_path / "c")
    with refused("reference and target must have the same vocabulary, got 48 and 40 outputs"):
        with_trainer(tmp_path, kind_of("padded right", reference=reference))
    with_trainer(tmp_path, kind_of("padded right", reference=reference, padded_vocabulary=True)).train()


def test_a_level_is_of_its_kind_of_model(tmp_path):
    with refused("level='sample' is for classifiers, got LlamaForCausalLM"):
        with_trainer(tmp_path, kind_of("padded right", level="sample"))
    with refused("level='token' is for causal language models, got BertForSequenceClassification"):
        with_classifier(tmp_path, kind_of("padded right"))
    with refused("level must be one of token, sequence, sample, got 'word'"):
        kind_of("padded right", level="word")
    with pytest.raises(TypeError, match="reference must be a model or ReferenceLosses, got 'llama'"):
        kind_of("padded right", reference="llama")


def test_a_cache_of_other_data_or_another_reference_is_refused(tmp_path):
    cache = tmp_path / "cache"
    with_trainer(tmp_path, kind_of("padded right", cache=cache)).get_train_dataloader()
    with refused("'reference' is '.*' there and '.*' here"):
        with_trainer(tmp_path, kind_of("padded right", cache=cache, reference=decoder(2))).train()
    with refused("'dtype' is 'torch.float64' there and 'torch.float32' here|'reference' is"):
        with_trainer(tmp_path, kind_of("padded right", cache=cache, reference=decoder(1).float())).train()
    with refused("sequences of a batch have no losses in .*cache, one of .* tokens that begins with"):
        with_trainer(tmp_path, kind_of("padded right", cache=cache), data=sentences(seed=5)).train()
    with refused("cache=.* is for a reference that is a model"):
        kind_of("padded right", reference=ReferenceLosses(cache), cache=cache)


def test_a_cache_is_of_a_known_number_of_samples(tmp_path):
    stream = sentences().to_iterable_dataset()
    with refused("cache needs a train_dataset of known samples, got an IterableDataset"):
        with_trainer(tmp_path, kind_of("padded right", cache=tmp_path / "cache"), data=stream).train()
    with_trainer(tmp_path, kind_of("padded right"), data=stream).train()


def test_nothing_to_predict_is_refused(tmp_path):
    with refused("all labels of a batch are -100: leave out samples"):
        with_trainer(tmp_path, kind_of("padded right"), data=sentences(4, masked=99)).train()


@pytest.mark.parametrize(
    "level, message", [("sequence", "at least 2 samples to compare, got 1"), ("token", "reference_losses")]
)
def test_one_sequence_or_a_reference_without_numbers_is_refused(tmp_path, level, message):
    reference = decoder(1)
    if level == "token":
        with torch.no_grad():
            reference.lm_head.weight[3] = torch.nan
    with refused(message):
        with_trainer(
            tmp_path, kind_of("padded right", level=level, reference=reference), per_device_train_batch_size=1
        ).train()
