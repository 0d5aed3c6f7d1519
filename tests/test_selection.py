"""Selection: exact laws of small draws, plain loops for JEST, the CVaR weights, and ranks against one process."""

import itertools
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from scipy.stats import chisquare

from drrho import KL, CVaR, constrained_risk, penalized_risk
from drrho.contrastive import info_nce
from drrho.selection import (
    PairFeatures,
    joint_selection,
    joint_selection_from_features,
    pair_losses,
    sample,
    top_k,
)
from drrho.validation import deferred_checks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCORES = [0.3, -1.0, 1.1, 0.0]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def features(n, seed=0, width=6, temperature=0.2, bias=0.0, dtype=torch.float64):
    image, text = (torch.nn.functional.normalize(normal(n, width, seed=2 * seed + i), dim=1) for i in range(2))
    return PairFeatures(image.to(dtype), text.to(dtype), temperature, bias)


def softmax(scores):
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def sequence_law(n, k, scores_given):
    """Probability of every ordered choice when each draw is from the softmax of the scores given those before."""
    law = {}
    for order in itertools.permutations(range(n), k):
        law[order] = 1.0
        for step, drawn in enumerate(order):
            left = [i for i in range(n) if i not in order[:step]]
            scores = scores_given(order[:step])
            law[order] *= softmax([scores[i] for i in left])[left.index(drawn)]
    return law


def assert_law(draws, law):
    """A chi-square test at a level that some twenty tests with fixed seeds pass; what is wrong falls far below it."""
    counts = {order: 0 for order in law}
    for draw in draws:
        counts[tuple(draw)] += 1
    expected = np.array(list(law.values())) * len(draws)
    assert expected.min() > 5
    assert chisquare(list(counts.values()), expected).pvalue > 1e-5


# The largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (9,), (2, 7), (2, 0, 5), (3, 2, 40)])
def test_top_k_is_the_head_of_a_stable_sort(shape, dtype):
    scores = normal(*shape, dtype=dtype).mul(2).round()  # many ties
    for k in range(1, shape[-1] + 1):
        chosen = top_k(scores, k)
        assert chosen.shape == (*shape[:-1], k)
        for row, indices in zip(scores.reshape(-1, shape[-1]).tolist(), chosen.reshape(-1, k).tolist(), strict=True):
            assert indices == sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k]


@pytest.mark.parametrize("k", [1, 3, 10, 19, 20])
def test_top_k_is_the_support_of_the_cvar_weights(k):
    losses = normal(4, 20)
    weights = constrained_risk(losses, CVaR(k / 20)).weights
    chosen = torch.zeros_like(weights).scatter_(-1, top_k(losses, k), 1.0)
    assert torch.equal(weights > 1e-12, chosen > 0)
    assert torch.allclose(weights, chosen / k)


def test_top_k_follows_a_permutation():
    scores, order = normal(30), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[top_k(scores[order], 11)], top_k(scores, 11))


# The softmax sample


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_have_the_law_of_sequential_draws(k, temperature):
    draws = sample(torch.tensor(SCORES).expand(40000, 4), k, seed=k, temperature=temperature)
    assert_law(draws.tolist(), sequence_law(4, k, lambda _: [score / temperature for score in SCORES]))


@pytest.mark.slow
def test_seeds_are_as_independent_as_rows():
    draws = [tuple(sample(SCORES, 2, seed=seed).tolist()) for seed in range(4000)]
    assert_law(draws, sequence_law(4, 2, lambda _: SCORES))
    pairs = [(a[0], b[0]) for a, b in zip(draws[::2], draws[1::2], strict=True)]
    single = softmax(SCORES)
    assert_law(pairs, {(i, j): single[i] * single[j] for i in range(4) for j in range(4)})


@pytest.mark.parametrize("scores", [[0.0, 1e4], [-1e4, 1e4, 9e3], [1.7e308, -1.7e308, -1e308]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_far_apart_come_in_order(scores, dtype):
    scores = torch.tensor(scores, dtype=torch.float64).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    assert torch.equal(sample(scores, len(scores), seed=0), top_k(scores.double(), len(scores)))


def test_a_shift_changes_no_draw():
    scores = normal(5, 50).mul(16).round()
    for shift in (2.0**52, -(2.0**52), 3.0):
        assert torch.equal(
            sample(scores + shift, 20, seed=3, temperature=8.0), sample(scores, 20, seed=3, temperature=8)
        )


def test_a_large_offset_keeps_the_law():
    draws = sample(
        (1e17 + 16 * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)).expand(20000, 3), 1, seed=5, temperature=16
    )
    assert_law(draws.tolist(), sequence_law(3, 1, lambda _: [0.0, 1.0, 2.0]))


def test_every_dtype_draws_from_its_own_values():
    scores = normal(200, dtype=torch.bfloat16)
    for dtype in DTYPES:
        assert torch.equal(sample(scores.to(dtype), 50, seed=1), sample(scores, 50, seed=1))


def test_temperature_zero_is_top_k_and_seeds_differ():
    scores = normal(3, 40).round()
    assert torch.equal(sample(scores, 13, seed=0, temperature=0.0), top_k(scores, 13))
    assert torch.equal(sample(scores, 13, seed=7), sample(scores, 13, seed=7))
    assert not torch.equal(sample(scores, 13, seed=7), sample(scores, 13, seed=8))
    assert torch.equal(sample(scores, 40, seed=2**64 - 1).sort().values, torch.arange(40).expand(3, 40))


# Joint selection


def additive_scores(matrix, chosen):
    """The growth of sum_ij a_ij over the chosen when a candidate joins them."""

    def total(batch):
        return sum(matrix[i][j] for i in batch for j in batch)

    return [total([*chosen, c]) - total(chosen) for c in range(len(matrix))]


def greedy(n, size, chunks, scores_given):
    """The largest scores of each chunk, in plain Python."""
    batch = []
    for part in np.array_split(np.arange(size), chunks):
        scores = scores_given(batch)
        left = sorted((i for i in range(n) if i not in batch), key=lambda i: (-scores[i], i))
        batch = batch + left[: len(part)]
    return batch


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5, 6])
def test_joint_selection_at_temperature_zero_is_greedy_by_chunks(chunks):
    matrix = normal(10, 10, seed=chunks)
    expected = greedy(10, 6, chunks, lambda batch: additive_scores(matrix.tolist(), batch))
    for given in (matrix, matrix.numpy(), matrix.tolist(), matrix.float()):
        assert joint_selection(given, 6, chunks=chunks, seed=0, temperature=0.0).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_joint_selection_has_the_law_of_conditional_draws(temperature):
    matrix = normal(3, 3, seed=4)  # far from symmetric
    draws = [joint_selection(matrix, 2, chunks=2, seed=s, temperature=temperature).tolist() for s in range(2500)]
    scaled = (matrix / temperature).tolist()
    assert_law(draws, sequence_law(3, 2, lambda batch: additive_scores(scaled, list(batch))))


def test_one_chunk_is_a_sample_of_the_diagonal_and_the_input_stays():
    matrix = normal(12, 12, seed=2) * 1e4
    before = matrix.clone()
    assert torch.equal(joint_selection(matrix, 5, chunks=1, seed=9), sample(matrix.diagonal(), 5, seed=9))
    everything = joint_selection(matrix, 12, chunks=4, seed=9)
    assert everything.sort().values.tolist() == list(range(12))
    assert torch.equal(matrix, before)


def logits_of(model):
    return (model.image.double() @ model.text.double().T / model.temperature + model.bias).tolist()


def sigmoid_learnability(target, reference):
    """The pairwise matrix from log1p, entry by entry."""

    def loss(t, i, j):
        return math.log1p(math.exp(-t if i == j else t))

    t, r = logits_of(target), logits_of(reference)
    return [[loss(t[i][j], i, j) - loss(r[i][j], i, j) for j in range(len(t))] for i in range(len(t))]


def softmax_scores(target, reference, batch):
    """By the robust risk of each anchor over the chosen as its negatives: their number cancels."""

    def loss(model, c):
        t = torch.tensor(logits_of(model), dtype=torch.float64)
        if not batch:
            return -t[c, c]
        return sum(penalized_risk(side[c, batch] - t[c, c], KL(), 1.0).value for side in (t, t.T)) / 2

    return [float(loss(target, c) - loss(reference, c)) for c in range(len(target.image))]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
def test_sigmoid_features_choose_as_their_matrix(chunks, temperature):
    target, reference = features(16, 1, bias=-2.0, temperature=0.05), features(16, 2, width=3, bias=-3.0)
    matrix = sigmoid_learnability(target, reference)
    assert torch.equal(
        joint_selection_from_features(
            target, reference, 8, chunks=chunks, seed=5, temperature=temperature, loss="sigmoid"
        ),
        joint_selection(matrix, 8, chunks=chunks, seed=5, temperature=temperature),
    )


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_softmax_features_at_temperature_zero_are_greedy_by_chunks(chunks):
    target, reference = features(9, 3, temperature=0.03), features(9, 4, width=2, temperature=0.1)
    expected = greedy(9, 4, chunks, lambda batch: softmax_scores(target, reference, batch))
    for t, r in [
        (target, reference),
        (target._replace(bias=3.0), reference._replace(bias=-1.0)),
        (features(9, 3, temperature=0.03, dtype=torch.float32), reference),
    ]:
        assert joint_selection_from_features(t, r, 4, chunks=chunks, seed=0, temperature=0.0).tolist() == expected


@pytest.mark.slow
def test_softmax_features_have_the_law_of_conditional_draws():
    target, reference = features(3, 5, temperature=0.5), features(3, 6, temperature=0.4)
    draws = [joint_selection_from_features(target, reference, 2, chunks=2, seed=seed).tolist() for seed in range(1500)]
    assert_law(draws, sequence_law(3, 2, lambda batch: softmax_scores(target, reference, list(batch))))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_cold_logits_are_finite_and_autocast_changes_nothing(loss):
    def choose(dtype, temperature):
        pair = features(40, 7, temperature=1e-4, dtype=dtype), features(40, 8, dtype=dtype)
        return joint_selection_from_features(*pair, 16, chunks=4, seed=1, loss=loss, temperature=temperature)

    for temperature in (0.0, 1.0, 1e3):
        expected = choose(torch.float64, temperature)
        assert expected.unique().numel() == 16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(choose(torch.float32, temperature), expected)


def test_large_sigmoid_losses_keep_their_digits():
    target = PairFeatures(torch.ones(2, 1), torch.tensor([[-20.0], [-20.0 - 1e-9]], dtype=torch.float64), 1.0)
    reference = PairFeatures(torch.ones(2, 1), torch.zeros(2, 1), 1.0)
    chosen = joint_selection_from_features(target, reference, 1, chunks=1, seed=0, temperature=0.0, loss="sigmoid")
    assert chosen.tolist() == [1]


# Losses of pairs


@pytest.mark.parametrize("block", [1, 4, 512])
def test_softmax_losses_are_cross_entropies_of_rows_and_columns(block, monkeypatch):
    monkeypatch.setattr("drrho.selection.ROWS", block)
    monkeypatch.setattr("drrho.selection.TILE", block)
    pairs = features(9, 3, temperature=0.03)
    logits, own = torch.tensor(logits_of(pairs)).double(), torch.arange(9)
    sides = [torch.nn.functional.cross_entropy(side, own, reduction="none") for side in (logits, logits.T)]
    found = pair_losses(pairs)
    assert torch.allclose(found, (sides[0] + sides[1]) / 2, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.mean(), info_nce(pairs.image, pairs.text, 0.03), rtol=1e-12)
    assert torch.allclose(pair_losses(pairs._replace(bias=5.0)), found, rtol=1e-10)


@pytest.mark.parametrize("block", [1, 4, 512])
def test_sigmoid_losses_are_what_a_pair_adds_to_the_sum_over_pairs(block, monkeypatch):
    monkeypatch.setattr("drrho.selection.ROWS", block)
    monkeypatch.setattr("drrho.selection.TILE", block)
    target, reference = features(9, 1, bias=-2.0, temperature=0.05), features(9, 2, width=3, bias=-3.0)
    matrix = sigmoid_learnability(target, reference)
    everybody = list(range(9))
    expected = [additive_scores(matrix, [j for j in everybody if j != i])[i] for i in everybody]
    found = pair_losses(target, loss="sigmoid") - pair_losses(reference, loss="sigmoid")
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_losses_of_pairs_in_float32_and_cold_stay_near_float64():
    for loss in ("softmax", "sigmoid"):
        wide, narrow = features(700, 5, temperature=1e-3), features(700, 5, temperature=1e-3, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pair_losses(narrow, loss=loss)
        assert found.dtype == torch.float64
        assert torch.allclose(found, pair_losses(wide, loss=loss), rtol=1e-5, atol=1e-3)


# Refusals


def from_features(size=4, chunks=2, reference=None, seed=0, **changes):
    target = features(8)._replace(**{key: value for key, value in changes.items() if key != "loss"})
    loss = changes.get("loss", "softmax")
    reference = features(8, 1) if reference is None else reference
    return joint_selection_from_features(target, reference, size, chunks=chunks, seed=seed, loss=loss)


REFUSED = [
    (lambda: top_k([1.0, 2.0], 3), r"k must lie in \[1, 2\].*got 3"),
    (lambda: top_k([1.0, 2.0], 0), r"k must lie in \[1, 2\].*got 0"),
    (lambda: top_k([1.0, math.nan], 1), r"scores must be finite, got nan at index \[1\]"),
    (lambda: top_k([[1.0], [-math.inf]], 1), r"scores must be finite, got -inf at index \[1, 0\]"),
    (lambda: top_k([], 1), "scores must have shape"),
    (lambda: sample(SCORES, 5, seed=0), r"k must lie in \[1, 4\].*got 5"),
    (lambda: sample(SCORES, 1, seed=-1), r"seed.*\[0, 2\^64\), got -1"),
    (lambda: sample(SCORES, 1, seed=0.5), "seed must be an integer"),
    (lambda: sample(SCORES, 1, seed=0, temperature=-1.0), r"temperature must lie in \[0, 1e300\], got -1"),
    (lambda: sample(SCORES, 1, seed=0, temperature=math.nan), "temperature.*got nan"),
    (lambda: joint_selection(torch.zeros(3, 4), 2, chunks=1, seed=0), r"learnability.*\[n, n\], got \[3, 4\]"),
    (lambda: joint_selection([[math.nan]], 1, chunks=1, seed=0), r"learnability must be finite.*\[0, 0\]"),
    (lambda: joint_selection(torch.zeros(4, 4), 3, chunks=4, seed=0), r"chunks.*in \[1, size = 3\], got 4"),
    (lambda: joint_selection(torch.zeros(4, 4), 4, chunks=0, seed=0), "chunks.*got 0"),
    (lambda: joint_selection(torch.zeros(4, 4), 5, chunks=1, seed=0), r"size must lie in \[1, 4\].*got 5"),
    (lambda: from_features(size=9, chunks=3), r"size must lie in \[1, 8\].*got 9"),
    (lambda: from_features(chunks=5), r"chunks.*in \[1, size = 4\], got 5"),
    (lambda: from_features(reference=features(7)), "reference must hold the 8 pairs.*got 7"),
    (lambda: from_features(text=normal(8, 5)), r"target\.image and target\.text.*\[8, 6\] and \[8, 5\]"),
    (lambda: from_features(temperature=0.0), "target must have a finite temperature > 0.*got 0"),
    (lambda: from_features(bias=math.inf), "target must have.*finite bias.*inf"),
    (lambda: from_features(loss="hinge"), "loss must be one of.*'hinge'"),
    (lambda: pair_losses(features(8), loss="hinge"), "loss must be one of.*'hinge'"),
    (lambda: pair_losses(features(8, temperature=-1.0)), "pairs must have a finite temperature > 0.*got -1"),
    (lambda: from_features(image=torch.full((8, 6), math.nan)), "learnability must be finite, got nan"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refusals_name_argument_value_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: top_k(torch.arange(3), 1), lambda: top_k([1.0, 2.0], 1.0)])
def test_integer_scores_and_fractional_numbers_are_refused(call):
    with pytest.raises(TypeError, match=r"scores must have a floating dtype|k must be an integer, got 1\.0"):
        call()


# Ranks

SHARDS = (5, 18, 0)
TIED = normal(sum(SHARDS), seed=11).round()
PLAIN = normal(sum(SHARDS), seed=12)
TARGET, REFERENCE = features(23, 13, bias=-1.0, temperature=0.1), features(23, 14, width=3)


def part_of(model, piece):
    return model._replace(image=model.image[piece], text=model.text[piece])


def choices(piece=slice(None), group=None):
    """Every function's choice among this piece of the samples."""
    answers = {}
    for k in (1, 4, 9, 23):
        answers[f"top {k}"] = top_k(PLAIN[piece], k, group=group)
        answers[f"top of ties {k}"] = top_k(TIED[piece], k, group=group)
        answers[f"sample {k}"] = sample(PLAIN[piece], k, seed=3, group=group)
        answers[f"offset {k}"] = sample(TIED[piece] + 2.0**52, k, seed=4, temperature=2.0, group=group)
        answers[f"top of all equal {k}"] = top_k(torch.zeros(23)[piece], k, group=group)
    target, reference = part_of(TARGET, piece), part_of(REFERENCE, piece)
    for loss in ("softmax", "sigmoid"):
        excess = pair_losses(target, loss=loss, group=group) - pair_losses(reference, loss=loss, group=group)
        answers[f"top of excess losses, {loss}"] = top_k(excess, 7, group=group)
    for loss, chunks, temperature in itertools.product(("softmax", "sigmoid"), (1, 3, 4, 6), (0.0, 1.0)):
        for size in (6, 18):
            answers[f"{loss} {chunks} {temperature} {size}"] = joint_selection_from_features(
                target, reference, size, chunks=chunks, seed=6, temperature=temperature, loss=loss, group=group
            )
    return answers


def refusals(rank, piece, group):
    """Messages about what one rank alone, or all together, must not pass; all ranks must come back from each."""
    wrong = PLAIN[piece].clone()
    if rank == 1:
        wrong[2] = math.nan
    target, reference = part_of(TARGET, piece), part_of(REFERENCE, piece)
    spoilt = target._replace(image=torch.full_like(target.image, math.inf)) if rank == 0 else target
    messages = []
    for call in (
        lambda: top_k(wrong, 2, group=group),
        lambda: top_k(PLAIN[piece], 24, group=group),
        lambda: top_k(PLAIN[piece], 2 + rank, group=group),
        lambda: top_k(PLAIN[piece].view(1, -1), 2, group=group),
        lambda: joint_selection_from_features(spoilt, reference, 4, chunks=2, seed=0, group=group),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        messages.append(str(refused.value))
    return messages


def work(rank, world, folder):
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=patience)
    try:
        start = sum(SHARDS[:rank])
        piece = slice(start, start + SHARDS[rank])
        answers = {"refusals": refusals(rank, piece, dist.group.WORLD), "choices": choices(piece, dist.group.WORLD)}
        torch.save(answers, Path(folder) / f"answers{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, (len(SHARDS), str(folder)), len(SHARDS))
    return [torch.load(folder / f"answers{rank}.pt") for rank in range(len(SHARDS))]


@pytest.mark.slow
def test_ranks_choose_what_one_process_chooses(ranks):
    for name, expected in choices().items():
        for rank, answers in enumerate(ranks):
            start = sum(SHARDS[:rank])
            mine = expected[(expected >= start) & (expected < start + SHARDS[rank])] - start
            assert torch.equal(answers["choices"][name], mine), name  # also in the same order


@pytest.mark.slow
def test_refusals_meet_on_all_ranks(ranks):
    for rank, answers in enumerate(ranks):
        nan, large, different, rows, features_ = answers["refusals"]
        assert ("got nan at index [2]" if rank == 1 else "on another") in nan
        assert "k must lie in [1, 23], the number of samples, got 24" in large
        assert "k must be the same on every rank, got [2, 3, 4]" in different
        assert "scores must have shape [n] with a group" in rows
        assert ("at index [0]" if rank == 0 else "on another") in features_


def test_with_deferred_checks_the_choice_is_the_same_and_nan_gives_some_indices():
    generator = torch.Generator().manual_seed(3)
    image, text, other = (
        torch.nn.functional.normalize(torch.randn(12, 4, generator=generator), dim=1) for _ in range(3)
    )
    tau, options = torch.tensor(0.2), {"chunks": 3, "seed": 5}
    known = PairFeatures(image, text, 0.2), PairFeatures(other, text, 0.1)
    with deferred_checks():
        model = PairFeatures(image, text, tau, torch.tensor(0.0))
        chosen = joint_selection_from_features(model, known[1], 6, **options)
        wrong = model._replace(image=image * torch.nan)
        any_of_them = joint_selection_from_features(wrong, known[1], 6, **options)
    assert torch.equal(chosen, joint_selection_from_features(*known, 6, **options))
    assert len(any_of_them) == 6 and ((any_of_them >= 0) & (any_of_them < 12)).all()
