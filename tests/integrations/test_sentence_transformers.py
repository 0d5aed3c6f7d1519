"""The steered losses of sentence-transformers, held equal to its own losses, in its own trainer."""

import difflib
import inspect
import json
import math
import re

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks

REASON = "needs the extra integrations (make test-integrations)"
pytest.importorskip("sentence_transformers", reason=REASON)
pytestmark = pytest.mark.filterwarnings("default")  # the host warns of its own deprecations

from datasets import Dataset  # noqa: E402
from integrations.embedders import COLUMNS, FOUR, assert_same, embedder, features, value_and_gradient  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as host  # noqa: E402

from drrho import KL, ChiSquare, CVaR  # noqa: E402
from drrho.integrations.guide_embeddings import GuideEmbeddings  # noqa: E402
from drrho.integrations.sentence_transformers import (  # noqa: E402
    CachedSteeredMultipleNegativesRankingLoss as Cached,
)
from drrho.integrations.sentence_transformers import SteeredMultipleNegativesRankingLoss as Steered  # noqa: E402

EVERY_DIRECTION = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
LAYOUTS = [{}, {"directions": EVERY_DIRECTION}, BOTH_WAYS, {"scale": 7.0}]
MASKS = [("absolute", 0.0), ("absolute", 0.1), ("absolute", -0.05), ("relative", 0.1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder):
    return embedder(folder)


@pytest.fixture(scope="module")
def guide(folder):
    return embedder(folder, seed=1)


def dataset(columns):
    names = ("anchor", "positive", "negative", "other")
    return Dataset.from_dict({name: list(texts) for name, texts in zip(names, columns, strict=False)})


# --- equal to the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [*COLUMNS.values(), FOUR], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_a_guide_it_is_the_hosts_loss(model, guide, columns, layout):
    theirs = host.MultipleNegativesRankingLoss(model, **layout)
    assert_same(Steered(model, **layout), theirs, columns)
    assert_same(Steered(model, guide, coefficient=0.0, **layout), theirs, columns)


def test_without_a_guide_the_cached_form_is_the_hosts_loss(model):
    for columns in (*COLUMNS.values(), FOUR):
        theirs = host.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
        assert_same(Cached(model, mini_batch_size=3), theirs, columns)


@pytest.mark.parametrize(("strategy", "margin"), MASKS)
@pytest.mark.parametrize("form", [Steered, Cached])
def test_an_infinite_coefficient_is_gist(model, guide, strategy, margin, form):
    """Also in mini-batches, where the first version of the host's loss took the wrong diagonal of the guide's."""
    theirs_form = {Steered: host.GISTEmbedLoss, Cached: host.CachedGISTEmbedLoss}[form]
    size = {Steered: {}, Cached: {"mini_batch_size": 3}}[form]
    for columns, anchors, positives in (("pairs", 1, 1), ("pairs", 0, 0), ("triplets", 1, 0), ("triplets", 0, 0)):
        kinds = ("query_to_query",) * anchors + ("doc_to_doc",) * positives
        mask = {"margin": margin, "margin_strategy": strategy}
        mine = form(model, guide, coefficient=math.inf, scale=50.0, directions=("query_to_doc", *kinds), **mask, **size)
        contrast = {"contrast_anchors": bool(anchors), "contrast_positives": bool(positives)}
        assert_same(mine, theirs_form(model, guide, temperature=0.02, **mask, **contrast, **size), COLUMNS[columns])


# --- cached and live, whole and in parts ----------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, 32])
def test_mini_batches_change_nothing(model, guide, divergence, size):
    """The guide's similarity of anchor i with its positive is entry i of the whole batch, in every mini-batch."""
    steer = {"divergence": divergence, "coefficient": 0.7}
    for layout in ({}, {"margin": 0.0, "directions": EVERY_DIRECTION}):
        whole = Steered(model, guide, **steer, **layout)
        assert_same(Cached(model, guide, mini_batch_size=size, **steer, **layout), whole, FOUR)
    assert_same(Cached(model, guide, mini_batch_size=size, mini_batch_num_tokens=6), Steered(model, guide), FOUR)


def test_mini_batches_without_gradients(model, guide):
    columns = features(model, FOUR)
    with torch.no_grad():
        whole, parts = (form(model, guide)(columns) for form in (Steered, Cached))
    torch.testing.assert_close(parts, whole)
    assert not parts.requires_grad


@pytest.mark.parametrize("form", [Steered, Cached])
def test_a_cached_guide_is_the_live_one(model, guide, form, tmp_path):
    for columns in (*COLUMNS.values(), FOUR):
        cached = GuideEmbeddings.cached(tmp_path / str(len(columns)), guide, dataset(columns))
        labels = torch.tensor(cached.dataset["label"])
        order = [4, 0, 6, 2]
        chosen = [[column[i] for i in order] for column in columns]
        live, _ = value_and_gradient(form(model, guide), chosen)
        found, _ = value_and_gradient(form(model, cached), chosen, labels[order])
        torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-6)


def test_a_guide_with_another_tokenizer_reads_the_text(folder, model):
    words = [f"w{k}" for k in reversed(range(50))]
    other = embedder(folder, seed=2, words=words)
    columns = COLUMNS["triplets"]
    assert Steered(model, other)._source.retokenizes
    theirs = host.GISTEmbedLoss(model, other, contrast_positives=False, contrast_anchors=False)
    assert_same(Steered(model, other, coefficient=math.inf, margin=0.0, scale=100.0), theirs, columns)
    assert_same(Cached(model, other, mini_batch_size=2), Steered(model, other), columns)
    short = embedder(folder, seed=1, length=8)  # the same tokens, but fewer of them
    assert Steered(model, short)._source.retokenizes


# --- in the host's trainer ------------------------------------------------------------------------------------


def trained(model, loss, data, folder, **more):
    fixed = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, **fixed | more
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_trainer_takes_it_with_accumulation_and_writes_the_model_card(folder, guide, tmp_path):
    columns = [list(column) * 8 for column in FOUR]
    cached = GuideEmbeddings.cached(tmp_path / "guide", guide, dataset(columns))
    curves = []
    for form, source, data, size in (
        (Steered, cached, cached.dataset, {}),
        (Cached, cached, cached.dataset, {"mini_batch_size": 2}),
        (Steered, guide, dataset(columns), {}),
    ):
        model = embedder(folder, seed=3)
        loss = form(model, source, divergence=CVaR(0.5), coefficient=0.5, **size)
        curves.append(trained(model, loss, data, tmp_path / "run", gradient_accumulation_steps=2))
        card = model.model_card_data
        model.save_pretrained(str(tmp_path / "saved"))
        text = (tmp_path / "saved" / "README.md").read_text()
        assert f"{form.__module__}.{form.__name__}" in text
        assert "CVaR(alpha=0.5)" in text and "Model Steering" in text and card is not None
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)


def test_the_configuration_is_written_as_json(model, guide):
    config = Cached(model, divergence=ChiSquare(), coefficient=0.5, mini_batch_size=4).get_config_dict()
    assert json.loads(json.dumps(config)) == {
        "guide": None,
        "divergence": "ChiSquare()",
        "coefficient": 0.5,
        "margin": None,
        "margin_strategy": "absolute",
        "scale": 20.0,
        "similarity_fct": "cos_sim",
        "gather_across_devices": False,
        "directions": ["query_to_doc"],
        "partition_mode": "joint",
        "mini_batch_size": 4,
        "mini_batch_num_tokens": None,
    }
    assert Steered(model, guide).get_config_dict()["guide"] is guide
    assert Steered(model).temperature == 0.05


@pytest.mark.parametrize("form", ["SteeredMultipleNegativesRankingLoss", "CachedSteeredMultipleNegativesRankingLoss"])
def test_the_hosts_own_script_is_steered_by_three_lines(form, folder, guide, tmp_path, monkeypatch):
    stock = inspect.getdoc(host.MultipleNegativesRankingLoss.__init__)
    stock = inspect.cleandoc(stock[stock.index("from sentence_transformers import") :])
    embedder(folder, seed=4)
    guide.save_pretrained(str(tmp_path / "guide"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    steered = stock.replace(
        "loss = losses.MultipleNegativesRankingLoss(model)",
        f"from drrho.integrations.sentence_transformers import {form}\n"
        f"loss = {form}(model, SentenceTransformer('guide'))",
    )
    changed = [line for line in difflib.ndiff(stock.splitlines(), steered.splitlines()) if line.startswith("+ ")]
    assert 0 < len(changed) <= 3
    for script in (stock, steered):
        local = re.sub("microsoft/mpnet-base", str(folder / "model-4-40-16"), script)
        names = {}
        exec(local, names)
        assert names["trainer"].state.global_step == 3


def test_it_can_be_the_loss_that_matryoshka_wraps(model, guide):
    columns = COLUMNS["triplets"]
    values = [
        value_and_gradient(host.MatryoshkaLoss(model, form(model, guide), [16, 4]), columns)
        for form in (Steered, Cached)
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


# --- over ranks -----------------------------------------------------------------------------------------------


def gathering(rank, folder):
    torch.set_num_threads(1)
    model, guide = (embedder(folder / str(rank), seed) for seed in (0, 1))  # with ranks, only the first would write
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        columns = [texts[:6] for texts in FOUR]
        options = {"coefficient": 0.7, "directions": EVERY_DIRECTION}
        value, gradient = value_and_gradient(Steered(model, guide, **options), columns)
        own = [texts[3 * rank : 3 * rank + 3] for texts in columns]
        for form, size in ((Steered, {}), (Cached, {"mini_batch_size": 2})):
            loss = form(model, guide, gather_across_devices=True, **options, **size)
            part, its_gradient = value_and_gradient(loss, own)
            dist.all_reduce(part)
            dist.all_reduce(its_gradient)
            torch.testing.assert_close(part / 2, value, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(its_gradient / 2, gradient, rtol=1e-6, atol=1e-8)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_gathered_over_two_ranks_it_is_the_loss_of_the_whole_batch(tmp_path):
    start_ranks(gathering, (tmp_path,), 2)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Steered, Cached])
def test_bad_input_is_one_clear_error(model, guide, folder, form, tmp_path):
    cached = GuideEmbeddings.cached(tmp_path, guide, dataset(COLUMNS["pairs"]))
    columns = COLUMNS["pairs"]
    with pytest.raises(ValueError, match="one pair has no negatives: leave it out"):
        value_and_gradient(form(model, guide), [texts[:1] for texts in columns])
    with pytest.raises(ValueError, match=r"train on guide\.dataset"):
        value_and_gradient(form(model, cached), columns)
    with pytest.raises(ValueError, match="coefficient must be finite"):
        form(model, guide, coefficient=math.nan)
    with pytest.raises(ValueError, match="Invalid directions"):
        form(model, guide, directions=("query_to_doc", "doc_to_answer"))
    broken = embedder(folder, seed=5)
    next(broken.parameters()).data[:] = math.nan
    with pytest.raises(ValueError, match="the guide's embeddings are not finite: check its weights"):
        value_and_gradient(form(model, broken), columns)


def test_mini_batches_must_have_texts(model):
    with pytest.raises(ValueError, match="mini_batch_size must be >= 1, got 0"):
        Cached(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="mini_batch_num_tokens must be a positive integer"):
        Cached(model, mini_batch_num_tokens=0)
