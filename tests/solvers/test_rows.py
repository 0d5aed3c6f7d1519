"""Normalized rows, their means, and how results of some rows are put among the others."""

import numpy as np
import pytest
import torch
from problems import normalized_rows, tensor

from drrho.solvers.rows import by_parts, column, scatter, some

LOSSES = tensor([[3.0, 1.0, 2.0, 3.0], [-5.0, 5.0, 0.0, 5.0], [7.0, 7.0, 7.0, 7.0]])


def test_rows_are_normalized_to_minus_one_and_zero():
    (block,) = normalized_rows(LOSSES).blocks()
    assert block.d.tolist() == [[0, -1, -0.5, 0], [-1, 0, -0.5, 0], [0, 0, 0, 0]]


def test_mean_and_ties():
    mean, ties = normalized_rows(LOSSES).mean_and_ties()
    assert mean.tolist() == [-0.375, -0.375, 0.0]
    assert ties.tolist() == [0.5, 0.5, 1.0]


def test_means_of_products_under_base_weights():
    base = tensor([[0.5, 0.25, 0.25, 0.0]])
    rows = normalized_rows(LOSSES, base)
    (found,) = rows.host_means(lambda block: ((block.d, block.d),))
    np.testing.assert_allclose(found, [0.25 + 0.0625, 0.5 + 0.0625, 0.0])


def test_a_long_row_in_blocks_has_the_means_of_numpy():
    z = np.random.default_rng(0).normal(size=(1, 200_000))
    rows = normalized_rows(z)
    assert len(list(rows.blocks())) > 1
    d = (z - z.max()) / np.ptp(z)
    first, square = rows.host_means(lambda block: (block.d, (block.d, block.d)))
    np.testing.assert_allclose([first[0], square[0]], [d.mean(), np.square(d).mean()], rtol=1e-12)


def test_selected_rows_keep_what_is_known_of_them():
    rows = normalized_rows(LOSSES)
    whole = rows.mean_and_ties()
    chosen = np.array([True, False, True])
    part = rows.select(chosen)
    assert len(part) == 2
    for field, of_part in zip(whole, part.mean_and_ties(), strict=True):
        assert of_part.tolist() == field[chosen].tolist()
    assert rows.select(np.ones(3, dtype=bool)) is rows
    assert rows.select(slice(None)) is rows


CONDENSED = {
    "normal": lambda rng: rng.normal(size=300_000),
    "heavy tails": lambda rng: rng.standard_t(2, size=300_000),
    "few values": lambda rng: rng.integers(0, 3, size=300_000) / 7,
    "mostly the maximum": lambda rng: np.minimum(rng.normal(size=300_000), -1.0),
    "mostly the minimum": lambda rng: np.maximum(rng.normal(size=300_000), 3.0),
}


@pytest.mark.parametrize("kind", CONDENSED)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_condensed_row_is_short_and_has_the_sums_of_smooth_functions(kind, is_weighted):
    rng = np.random.default_rng(1)
    z = CONDENSED[kind](rng)[None]
    base = None
    if is_weighted:
        base = rng.exponential(size=z.shape) * (rng.random(z.shape) < 0.9)
        base /= base.sum()
        base = tensor(base)
    rows = normalized_rows(z, base)
    condensed = rows.condensed()
    assert condensed is not None
    assert condensed.z.shape[-1] < 40_000
    np.testing.assert_allclose(condensed.mean_and_ties(), rows.mean_and_ties(), rtol=1e-12)

    def sums(block):
        return torch.ones_like(block.d), torch.exp(4 * block.d), 1 / (1.1 - block.d), torch.sin(9 * block.d)

    np.testing.assert_allclose(condensed.host_means(sums), rows.host_means(sums), rtol=1e-10, atol=1e-11)


def test_a_condensed_row_does_not_depend_on_the_order_of_the_losses():
    z = np.random.default_rng(1).normal(size=(1, 2**18))
    other = z.copy()
    others = np.flatnonzero(np.arange(2**18) % 2**6)  # all but those that place the bins
    other[0, others] = other[0, others[::-1]]
    first, second = normalized_rows(z).condensed(), normalized_rows(other).condensed()
    assert first is not None
    assert second is not None
    bins = 2**12
    assert first.z[0, -bins:].tolist() == second.z[0, -bins:].tolist()


def test_short_rows_and_several_rows_are_not_condensed():
    z = np.random.default_rng(1).normal(size=(2, 200_000))
    assert normalized_rows(z).condensed() is None
    assert normalized_rows(z[:1, :1000]).condensed() is None


def test_column_is_a_number_for_one_row():
    assert column(np.array([2.5]), torch.device("cpu")) == 2.5
    assert column(tensor([2.5]), torch.device("cpu")) == 2.5
    assert column(np.array([1.0, 2.0]), torch.device("cpu")).tolist() == [[1.0], [2.0]]


def test_scatter_puts_each_in_its_place():
    chosen = np.array([True, False, True])
    assert scatter(chosen, np.array([1.0, 3.0]), np.array([2.0])).tolist() == [1.0, 2.0, 3.0]
    assert scatter(chosen, np.array([True, True]), False).tolist() == [True, False, True]


def test_by_parts_asks_each_function_for_its_rows_only():
    x = np.array([1.0, -2.0, 3.0])

    def part(sign):
        return lambda rows: (sign * x[rows], 10 * x[rows])

    for flags in (x > 0, x > -9, x > 9):
        size, tens = by_parts(flags, part(1), part(-1))
        assert size.tolist() == np.where(flags, x, -x).tolist()
        assert tens.tolist() == (10 * x).tolist()


def test_some():
    assert some(np.array([True])) and some(np.array([False, True]))
    assert not some(np.array([False])) and not some(np.array([False, False]))
