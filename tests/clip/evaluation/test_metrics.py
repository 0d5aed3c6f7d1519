"""The zero-shot metrics against plain-Python oracles and CLIP_benchmark's definition of R@k."""

import pytest
import torch
import torch.nn.functional as F
from random_tensors import features, integers
from task_folders import Largest

from experiments.clip.evaluation.metrics import (
    Naming,
    ZeroShot,
    naming,
    predictions,
    retrieval,
    wrong_items_ahead,
    zero_shot,
)


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


# --- refusals and predictions --------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="caption_features has"):
        predictions(good, bad, 1)


def test_no_features_are_refused():
    with pytest.raises(ValueError, match="image_features has shape"):
        naming(torch.empty(0, 4), features(3, 0, 4), torch.empty(0, dtype=torch.long))


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="labels has 3; keep labels from 0 to 2"):
        naming(features(2, 0), features(3, 1), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels has shape \(1,\) for 2 features"):
        naming(features(2, 0), features(3, 1), torch.tensor([0]))


def test_predictions_are_the_best_captions_in_order():
    images, captions = features(4, 0), features(9, 1)
    scores, indices = predictions(images, captions, 3)
    for row, expected, order in zip(scores, cosines(images, captions), indices.tolist(), strict=True):
        assert order == sorted(range(9), key=lambda j: -expected[j])[:3]
        assert row.tolist() == pytest.approx([expected[j] for j in order], abs=1e-6)
    with pytest.raises(ValueError, match="k is 10"):
        predictions(images, captions, 10)


# --- order among equal scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
def test_wrong_items_ahead_is_a_stable_sort(tile):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (30, 3), generator=generator).float()  # many ties
    items = torch.randint(-1, 2, (25, 3), generator=generator).float()
    query_labels = torch.randint(0, 8, (30,), generator=generator)
    item_labels = torch.cat([torch.arange(8), torch.randint(0, 8, (17,), generator=generator)])
    ahead = wrong_items_ahead(queries, items, query_labels, item_labels, tile)
    order = (queries @ items.T).sort(dim=1, descending=True, stable=True).indices
    expected = (item_labels[order] == query_labels[:, None]).int().argmax(dim=1)
    assert torch.equal(ahead, expected)


def test_wrong_items_ahead_never_holds_all_scores():
    queries, items = torch.randn(8, 4), torch.randn(100_000, 4)
    labels = torch.arange(100_000)
    with Largest() as largest:
        wrong_items_ahead(queries, items, labels[:8], labels, 1000)
    assert largest.size == 8 * 1000
