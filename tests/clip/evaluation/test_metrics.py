"""The zero-shot metrics against plain-Python oracles, open_clip and CLIP_benchmark's definition of R@k."""

import json
import unicodedata

import pytest
import torch
import torch.nn.functional as F

from experiments.clip.evaluation.metrics import (
    Naming,
    ZeroShot,
    encode_images,
    encode_texts,
    naming,
    predictions,
    retrieval,
    zero_shot,
    zero_shot_classifier,
)
from experiments.clip.glyphs.evaluation import (
    BASE_LETTERS,
    evaluate,
    glyph_attributes,
)


def features(count, seed, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def integers(low, high, count, seed):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))


def cosines(queries, items):
    """Cosines in Python floats."""
    a, b = queries.double().tolist(), items.double().tolist()
    norm = [[sum(x * x for x in row) ** 0.5 for row in rows] for rows in (a, b)]
    return [
        [sum(x * y for x, y in zip(p, q, strict=True)) / (norm[0][i] * norm[1][j]) for j, q in enumerate(b)]
        for i, p in enumerate(a)
    ]


def recall_oracle(scores, query_labels, item_labels, k):
    hits = 0
    for row, label in zip(scores, query_labels, strict=True):
        top = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        hits += any(item_labels[j] == label for j in top)
    return hits / len(scores)


def clip_benchmark_recall(scores, positive, k):
    """R@k by the formula of CLIP_benchmark: true positives over positives, then the share above zero."""
    top = F.one_hot(scores.topk(k, dim=1).indices, scores.shape[1])  # [n, k, m]
    found = (top * positive[:, None, :]).sum(dim=(1, 2))
    return (found / positive.sum(dim=1) > 0).double().mean().item()


# --- naming and zero-shot -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_naming_matches_a_plain_top_k(seed):
    images, captions, labels = features(40, seed), features(15, seed + 100), integers(0, 15, 40, seed)
    scores = cosines(images, captions)
    result = naming(images, captions, labels)
    assert result.top1 == pytest.approx(recall_oracle(scores, labels.tolist(), list(range(15)), 1))
    assert result.top5 == pytest.approx(recall_oracle(scores, labels.tolist(), list(range(15)), 5))
    assert result[2:] == (1 / 15, 40, 15)


@pytest.mark.parametrize("seed", range(5))
def test_zero_shot_matches_plain_accuracy_and_mean_recall(seed):
    images, classifier = features(60, seed), features(7, seed + 100)
    labels = integers(0, 6, 60, seed)  # the last class has no sample
    predicted = [max(range(7), key=row.__getitem__) for row in cosines(images, classifier)]
    right = [p == t for p, t in zip(predicted, labels.tolist(), strict=True)]
    recalls = []
    for c in sorted(set(labels.tolist())):
        mine = [r for r, t in zip(right, labels.tolist(), strict=True) if t == c]
        recalls.append(sum(mine) / len(mine))
    result = zero_shot(images, classifier, labels)
    assert result.top1 == pytest.approx(sum(right) / 60)
    assert result.balanced == pytest.approx(sum(recalls) / len(recalls))
    assert result[2:] == (1 / 7, 60, 7)


def test_balanced_accuracy_weighs_classes_equally():
    images = torch.tensor([[1.0, 0.0]] * 8 + [[1.0, 0.0], [0.0, 1.0]])
    result = zero_shot(images, torch.eye(2), torch.tensor([0] * 8 + [1, 1]))
    assert result == ZeroShot(top1=0.9, balanced=0.75, chance=0.5, samples=10, classes=2)


def test_perfect_features_score_one():
    points = features(30, 0)
    labels = torch.arange(30)
    assert naming(3 * points, points, labels) == Naming(1, 1, 1 / 30, 30, 30)
    assert zero_shot(points, 2 * points, labels)[:2] == (1, 1)
    both = retrieval(points, points, labels, labels)
    assert both.image_to_text == both.text_to_image == {1: 1, 5: 1, 10: 1}


@pytest.mark.parametrize("images, texts", [("same", "same"), ("same", "own"), ("own", "same"), ("zero", "zero")])
def test_collapsed_features_score_at_most_chance(images, texts):
    count, width = 777, 130  # odd sizes, where a blocked matrix product rounds equal rows differently
    made = {
        "same": features(1, 1, width).expand(count, width).contiguous(),
        "own": features(count, 2, width),
        "zero": torch.zeros(count, width),
    }
    labels = torch.arange(count)
    both = retrieval(made[images], made[texts], labels, labels)
    for k in (1, 5, 10):
        assert both.image_to_text[k] <= k / count
        assert both.text_to_image[k] <= k / count
    named = naming(made[images], made[texts], labels)
    assert named.top1 <= 1 / count and named.top5 <= 5 / count
    assert max(zero_shot(made[images], made[texts], labels)[:2]) <= 1 / count


def test_ties_count_against_the_model():
    image = torch.tensor([[1.0, 0.0]])
    captions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    result = naming(image, captions, torch.tensor([0]))
    assert (result.top1, result.top5) == (0, 1)
    # A cosine lower by 1e-7 is within the rounding of the product, one lower by 2e-6 is not.
    near = torch.tensor([[1.0, 0.0], [1.0, 5e-4]])
    apart = torch.tensor([[1.0, 0.0], [1.0, 2e-3]])
    assert naming(image, near, torch.tensor([0])).top1 == 0
    assert naming(image, apart, torch.tensor([0])).top1 == 1
    # A tie between right items costs nothing.
    assert retrieval(image, captions, torch.tensor([4]), torch.tensor([4, 4, 4])).image_to_text[1] == 1


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunk_size_does_not_matter(chunk):
    images, texts = features(40, 3), features(25, 4)
    labels, text_labels = integers(0, 25, 40, 5), torch.arange(25)
    assert naming(images, texts, labels, chunk) == naming(images, texts, labels)
    assert zero_shot(images, texts, labels, chunk) == zero_shot(images, texts, labels)
    seen = labels.unique()
    arguments = images, texts[seen], labels, text_labels[seen]
    assert retrieval(*arguments, chunk=chunk) == retrieval(*arguments)


# --- retrieval ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_with_several_right_items_matches_both_oracles(seed):
    images, texts = features(50, seed), features(30, seed + 100)
    shared = torch.arange(12)  # each label at least once on both sides
    image_labels = torch.cat([shared, integers(0, 12, 38, seed)])
    text_labels = torch.cat([shared, integers(0, 12, 18, seed + 1)])
    result = retrieval(images, texts, image_labels, text_labels)
    scores = cosines(images, texts)
    positive = image_labels[:, None] == text_labels
    for k in (1, 5, 10):
        forth = recall_oracle(scores, image_labels.tolist(), text_labels.tolist(), k)
        back = recall_oracle(list(zip(*scores, strict=True)), text_labels.tolist(), image_labels.tolist(), k)
        assert result.image_to_text[k] == pytest.approx(forth)
        assert result.text_to_image[k] == pytest.approx(back)
        assert clip_benchmark_recall(torch.tensor(scores), positive, k) == pytest.approx(forth)
        assert clip_benchmark_recall(torch.tensor(scores).T, positive.T, k) == pytest.approx(back)


def test_retrieval_refuses_a_query_without_a_right_item():
    with pytest.raises(ValueError, match="text_labels has 9, which the other side lacks"):
        retrieval(features(2, 0), features(3, 1), torch.tensor([0, 1]), torch.tensor([0, 1, 9]))


# --- prompts ------------------------------------------------------------------------------------------------


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


# --- attribute tasks ----------------------------------------------------------------------------------------


def classes_by_caption(captions, task_name, minimum=1):
    tasks = {task.name: task for task in glyph_attributes(captions, minimum)}
    task = tasks[task_name]
    return {captions[i]: task.classes[c] for i, c in zip(task.members, task.labels, strict=True)}


def test_scripts_of_literal_captions():
    expected = {
        "latin small letter e with acute": "latin",
        "latin small letter dotless i": "latin",
        "latin letter small capital g": "latin",
        "latin subscript small letter a": "latin",
        "greek small letter alpha with tonos": "greek",
        "greek capital letter omega": "greek",
        "cyrillic small letter zhe": "cyrillic",
        "georgian mtavruli capital letter an": "georgian",
        "armenian modifier letter left half ring": "armenian",
        "arabic letter beh": "arabic",
        "old italic letter a": "old italic",
        "new tai lue letter high qa": "new tai lue",
    }
    others = [
        "modifier letter small h",
        "fullwidth latin small letter a",
        "combining latin small letter a",
        "negative circled latin capital letter a",
        "love letter",
        "box drawings light horizontal",
        "latin small ligature ff",
        "greek lunate epsilon symbol",
        "numeric letters",
    ]
    assert classes_by_caption([*others, *expected], "script") == expected


def test_every_unicode_script_starts_its_captions():
    names = [unicodedata.name(chr(code), "").lower() for code in range(0x20000)]
    scripts = classes_by_caption([name for name in names if name], "script", minimum=20)
    assert all(caption.startswith(script + " ") for caption, script in scripts.items())
    assert {"latin", "greek", "cyrillic", "arabic", "hebrew", "armenian", "georgian", "coptic"} <= set(scripts.values())
    assert not {word for script in scripts.values() for word in script.split()} & {
        "small",
        "capital",
        "modifier",
    }


def test_rare_scripts_are_no_class():
    captions = ["greek small letter alpha"] * 3 + ["latin small letter b"] * 3 + ["coptic small letter hori"] * 2
    (task,) = glyph_attributes(captions, minimum=3)
    assert task.classes == ("greek", "latin")
    assert task.members == (0, 1, 2, 3, 4, 5)
    assert task.labels == (0, 0, 0, 1, 1, 1)


def test_base_letters_of_literal_captions():
    expected = {
        "latin small letter e with acute": "e",
        "latin capital letter o with diaeresis and macron": "o",
        "latin small letter z with swash tail": "z",
    }
    others = [
        "latin small letter a",
        "latin small letter ae with acute",
        "latin small letter dotless i",
        "latin small letter dotless j with stroke",
        "latin small letter open e with retroflex hook",
        "latin letter small capital g",
        "latin letter small capital i with stroke",
        "greek small letter alpha with tonos",
        "modifier letter small h with hook",
        "modifier letter small h",
        "fullwidth latin small letter a with acute",
    ]
    captions = [*others, *expected]
    assert classes_by_caption(captions, "base letter") == expected
    task = glyph_attributes(captions)[-1]
    assert task.classes == BASE_LETTERS and len(BASE_LETTERS) == 26


def test_a_task_without_two_classes_is_left_out():
    assert glyph_attributes(["latin small letter e with acute", "box drawings light horizontal"]) == []


# --- the collector ------------------------------------------------------------------------------------------

VOCABULARY = [
    f"latin {case} letter {letter} with {mark}"
    for case in ("small", "capital")
    for letter in "aeiou"
    for mark in ("acute", "grave", "ogonek")
] + [f"greek small letter {name}" for name in ("alpha", "beta", "gamma")]


def encode_names(texts):
    """Give each name its own direction, so that an image of a name can be told apart from all others."""
    return torch.cat([features(1, sum(ord(c) * 31**i for i, c in enumerate(t)) % 2**31, 64) for t in texts])


def encode_image(batch):  # [b, 3, h, w] -> [b, d]
    return batch[:, 0, 0]


def images_of(captions):
    return encode_names(captions)[:, None, None, :].expand(-1, 3, 1, -1)


def test_evaluate_collects_the_three_evaluations():
    captions = VOCABULARY[3:20] + VOCABULARY[4:9] + VOCABULARY[-3:]  # 25 samples of 20 names
    batches = images_of(captions).split(4)
    result = evaluate(encode_image, encode_names, batches, captions, VOCABULARY, batch_size=7)
    assert result.naming == Naming(1, 1, 1 / 33, 25, 33)
    assert result.retrieval == ({1: 1, 5: 1, 10: 1}, {1: 1, 5: 1, 10: 1})
    assert set(result.attributes) == {"base letter"}  # three Greek letters are too few for a class

    (task,) = glyph_attributes(captions)
    classifier = zero_shot_classifier(encode_names, task.classes, task.templates)
    images = encode_names([captions[i] for i in task.members])
    assert result.attributes["base letter"] == zero_shot(images, classifier, torch.tensor(task.labels))
    assert result.attributes["base letter"].samples == 22

    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()
    assert result.as_dict()["retrieval"]["text_to_image"]["5"] == 1
    assert result.as_dict()["attributes"]["base letter"]["classes"] == 26


def test_evaluate_takes_no_gradient():
    weight = torch.nn.Parameter(torch.eye(64))
    tracked = []

    def encode(batch):
        output = encode_image(batch) @ weight
        tracked.append(output.requires_grad)
        return output

    evaluate(encode, encode_names, [images_of(VOCABULARY)], VOCABULARY, VOCABULARY)
    assert tracked == [False]


@pytest.mark.parametrize(
    "captions, vocabulary, message",
    [
        (VOCABULARY[:3], VOCABULARY, "image_batches has 2 images for 3 captions"),
        (["snowman", "comet"], VOCABULARY, "captions has 'snowman'"),
        (VOCABULARY[:2], [*VOCABULARY, VOCABULARY[5]], "more than once"),
    ],
)
def test_evaluate_refuses_mismatched_input(captions, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        evaluate(encode_image, encode_names, [images_of(VOCABULARY[:2])], captions, vocabulary)


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="image_batches is empty"):
        evaluate(encode_image, encode_names, [], [], VOCABULARY)
    with pytest.raises(ValueError, match="texts is empty"):
        encode_texts(encode_names, [])
    with pytest.raises(ValueError, match="image_features has shape"):
        naming(torch.empty(0, 4), features(3, 0, 4), torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_name(value):
    good, bad, labels = features(3, 0), features(3, 1), torch.arange(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="image_features has non-finite values in 1 of 3 rows"):
        naming(bad, good, labels)
    with pytest.raises(ValueError, match="caption_features has"):
        naming(good, bad, labels)
    with pytest.raises(ValueError, match="classifier has"):
        zero_shot(good, bad, labels)
    with pytest.raises(ValueError, match="text_features has"):
        retrieval(good, bad, labels, labels)
    with pytest.raises(ValueError, match="text_features has"):
        encode_texts(lambda texts: bad, ["a", "b", "c"])
    with pytest.raises(ValueError, match="caption_features has"):
        predictions(good, bad, 1)


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="labels has 3; keep labels from 0 to 2"):
        naming(features(2, 0), features(3, 1), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels has shape \(1,\) for 2 features"):
        naming(features(2, 0), features(3, 1), torch.tensor([0]))


def test_tiles_and_blocks_do_not_matter(monkeypatch):
    images, texts, labels = features(40, 3), features(25, 4), integers(0, 25, 40, 5)
    seen = labels.unique()

    def scores():
        encoded = encode_images(lambda batch: batch, images.split(7)), encode_texts(lambda some: texts, ["a"])
        found = naming(*encoded, labels), retrieval(encoded[0], encoded[1][seen], labels, seen)
        return *found, *(part.tolist() for part in (*encoded, predictions(*encoded, 3)[1]))

    expected = scores()
    for name, size in (("_ITEMS", 6), ("_QUERIES", 9), ("_BLOCK", 11)):
        monkeypatch.setattr(f"experiments.clip.evaluation.metrics.{name}", size)
    assert scores() == expected


def test_predictions_are_the_best_captions_in_order():
    images, captions = features(4, 0), features(9, 1)
    scores, indices = predictions(images, captions, 3)
    for row, expected, order in zip(scores, cosines(images, captions), indices.tolist(), strict=True):
        assert order == sorted(range(9), key=lambda j: -expected[j])[:3]
        assert row.tolist() == pytest.approx([expected[j] for j in order], abs=1e-6)
    with pytest.raises(ValueError, match="k is 10"):
        predictions(images, captions, 10)
