"""The collectors of features, and class vectors by hand and by open_clip."""

import pytest
import torch
from random_tensors import features, integers
from task_folders import classification, evaluate

from experiments.clip.errors import UserError
from experiments.clip.evaluation import tasks
from experiments.clip.evaluation.encoding import Encoder, encode_images, encode_texts, zero_shot_classifier
from experiments.clip.evaluation.metrics import naming, predictions, retrieval, wrong_items_ahead


def encode_letters(texts):
    """A text encoder without a model: letter counts, of any length."""
    return torch.tensor([[1.0 + text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def test_zero_shot_classifier_is_the_formula_by_hand():
    templates = ("{}", "small {}", "a capital {} letter")
    result = zero_shot_classifier(encode_letters, ("latin", "greek"), templates, batch_size=4)
    assert result.shape == (2, 26)
    for row, name in zip(result, ("latin", "greek"), strict=True):
        total = torch.zeros(26)
        for template in templates:
            vector = encode_letters([template.replace("{}", name)])[0]
            total += vector / vector.norm()
        torch.testing.assert_close(row, total / total.norm())


def test_zero_shot_classifier_agrees_with_open_clip():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    classes, templates = ("latin", "greek", "old italic"), ("{} small letter", "{} letter")
    ours = zero_shot_classifier(lambda texts: model.encode_text(tokenizer(texts)), classes, templates)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
    torch.testing.assert_close(ours, theirs.T)
    assert not ours.requires_grad


@pytest.mark.parametrize(
    "classes, templates, message",
    [
        (("latin",), ("a letter",), "templates has 'a letter'"),
        ((), ("{}",), r"classes \(0\)"),
        (("latin",), (), r"templates \(0\)"),
    ],
)
def test_zero_shot_classifier_refuses_unusable_prompts(classes, templates, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(encode_letters, classes, templates)


def test_tiles_and_blocks_do_not_matter(monkeypatch):
    images, texts, labels = features(40, 3), features(25, 4), integers(0, 25, 40, 5)
    seen = labels.unique()

    def scores():
        encoded = encode_images(lambda batch: batch, images.split(7)), encode_texts(lambda some: texts, ["a"])
        found = naming(*encoded, labels), retrieval(encoded[0], encoded[1][seen], labels, seen)
        return *found, *(part.tolist() for part in (*encoded, predictions(*encoded, 3)[1]))

    expected = scores()
    for name, size in (("metrics._ITEMS", 6), ("metrics._QUERIES", 9), ("encoding._BLOCK", 11)):
        monkeypatch.setattr(f"experiments.clip.evaluation.{name}", size)
    assert scores() == expected


def test_no_images_and_no_texts_are_refused():
    with pytest.raises(ValueError, match="image_batches is empty"):
        encode_images(lambda batch: batch, [])
    with pytest.raises(ValueError, match="texts is empty"):
        encode_texts(encode_letters, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_name(value):
    bad = features(3, 1)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="text_features has non-finite values in 1 of 3 rows"):
        encode_texts(lambda texts: bad, ["a", "b", "c"])
    with pytest.raises(ValueError, match="image_features has non-finite values in 1 of 3 rows"):
        encode_images(lambda batch: batch, [bad])


# --- an encoder of a model ----------------------------------------------------------------------------------------


@pytest.fixture
def tf32_is_on():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("tf32_is_on")
def test_only_towers_multiply_in_tf32_and_what_was_set_stays(tf32, reference, tmp_path, monkeypatch):
    """The switch of a GPU, which a CPU keeps too."""
    matmul = torch.backends.cuda.matmul
    seen = {"towers": [], "scores": []}

    def ahead(*arguments):
        seen["scores"].append(matmul.allow_tf32)
        return wrong_items_ahead(*arguments)

    monkeypatch.setattr(tasks, "wrong_items_ahead", ahead)
    hooks = [
        tower.register_forward_hook(lambda *_: seen["towers"].append(matmul.allow_tf32))
        for tower in (reference.model.visual, reference.model.transformer)
    ]
    evaluate(reference, classification(tmp_path / "task"), tf32=tf32, batch_size=4)
    for hook in hooks:
        hook.remove()
    assert set(seen["towers"]) == {tf32} and set(seen["scores"]) == {False}
    assert matmul.allow_tf32


def test_features_do_not_depend_on_how_many_calls_there_are(reference):
    texts = [f"letter {letter}" for letter in "abcdefg"]
    encoder = Encoder(reference, batch_size=3)
    with encoder.evaluating():
        by_three, at_once = encoder.texts(texts), Encoder(reference, batch_size=7).texts(texts)
        none = encoder.texts([]), encoder.images(None)
    torch.testing.assert_close(by_three, at_once)
    torch.testing.assert_close(by_three.norm(dim=1), torch.ones(7))
    assert [tuple(each.shape) for each in none] == [(0, at_once.shape[1])] * 2


def test_a_worker_s_error_is_raised_once_and_ends_the_batches(reference):
    def read(number):
        if number == 2:
            raise UserError("the third is damaged")
        return number

    batches = Encoder(reference, workers=2).own_batches(read, 5)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    with pytest.raises(UserError, match="the third is damaged"):
        next(batches)
    assert list(batches) == []
