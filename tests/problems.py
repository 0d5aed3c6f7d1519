"""Rows of losses to try: hypothesis strategies, named hard cases, radii, and the tolerances for them."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from drrho.solvers.rows import Rows

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def scale_of(losses):
    """max |z| + range: what value tolerances are relative to."""
    z = np.asarray(losses, dtype=float)
    return float(np.abs(z).max() + (z.max() - z.min()))


def value_tolerance(losses, dtype=torch.float64):
    """Absolute tolerance on a value (the smallest normal number keeps it positive on a row of zeros)."""
    return {torch.float64: 1e-12, torch.float32: 2e-6}[dtype] * scale_of(losses) + 1e-300


def ratio_tolerance(losses, ratios, temperature=math.inf, dtype=torch.float64):
    """Tolerance on n p: absolute by dtype, plus the rounding of the exponent of exp(z / temperature)."""
    z = np.asarray(losses, dtype=float)
    absolute = {torch.float64: 1e-10, torch.float32: 2e-5}[dtype]
    exponent = (z.max() - z.min()) / temperature if temperature > 0 else 0.0
    return absolute + 8 * EPS[dtype] * (1 + exponent) * np.asarray(ratios)


def _rng(seed):
    return np.random.default_rng(seed)


def _ties_at_the_top(n=40):
    z = _rng(5).normal(size=n)
    z[: n // 10] = z.max() + 0.5
    return z


HARD = {
    "single": np.array([3.7]),
    "single zero": np.array([0.0]),
    "pair": np.array([-1.0, 2.0]),
    "zeros": np.zeros(5),
    "constant": np.full(6, 2.5),
    "constant not representable": np.full(7, 0.1),
    "normal": _rng(0).normal(size=60),
    "exponential": _rng(1).exponential(size=60),
    "heavy tail": _rng(2).pareto(1.5, size=50),
    "all negative": -1 - _rng(3).exponential(size=30),
    "maximum zero": -_rng(4).integers(0, 50, size=30) / 8.0 * (np.arange(30) > 0),
    "tied maxima": _ties_at_the_top(),
    "tied minima": -_ties_at_the_top(),
    "ties everywhere": _rng(6).integers(-2, 3, size=40).astype(float),
    "two values": np.repeat([0.0, 1.0], [13, 7]),
    "one high": np.repeat([0.0, 1.0], [19, 1]),
    "one low": np.repeat([-1.0, 0.0], [1, 19]),
    "offset 1e6": 1e6 + _rng(7).exponential(size=30),
    "offset -1e8": -1e8 + _rng(8).normal(size=30),
    "offset 1e8": 1e8 + _rng(8).normal(size=30),
    "scale 1e-8": 1e-8 * _rng(9).normal(size=30),
    "scale 1e4": 1e4 * _rng(9).normal(size=30),
    "scale 1e-150": 1e-150 * _rng(10).normal(size=20),
    "scale 1e150": 1e150 * _rng(10).normal(size=20),
    "geometric decay": 0.5 ** np.arange(44.0),
    "geometric approach": -(0.5 ** np.arange(40.0)),
    "close pair at the top": np.array([0.0, -2.0, 1 / 64]),
    "close group at the top": np.array([0.0, 0.0, 0.0, 1e-9, -5.0]),
    "narrow excess": 2.3 + 1e-3 * _rng(11).uniform(-1, 1, size=50),
    "narrow around zero": 1e-3 * _rng(12).normal(size=50),
}

RADII = [0.0, 1e-14, 1e-10, 1e-6, 1e-3, 0.05, 0.5, 2.0, 50.0]
ALPHAS = [1e-9, 0.013, 0.1, 1 / 3, 0.4, 0.5, 0.77, 0.99, 1.0]


def hard_cases(*, varied=False, at_least=1):
    """(name, losses) of the hard cases; `varied` leaves out constant rows."""
    return [(name, z) for name, z in HARD.items() if len(z) >= at_least and not (varied and z.min() == z.max())]


# Multiples of 1/64 below 2^10: shifts by integers and scalings by powers of two are then exact.
_levels = st.one_of(
    st.integers(-3, 3).map(float),
    st.integers(-64000, 64000).map(lambda k: k / 64),
    st.integers(-64, 64).map(lambda k: k / 64),
)


def rows(min_size=1, max_size=12, varied=False):
    """One row of losses as a list of floats, ties likely."""
    row = st.lists(_levels, min_size=max(min_size, 2 if varied else 1), max_size=max_size)
    return row.filter(lambda z: min(z) < max(z)) if varied else row


def radii(low=-14.0, high=2.0):
    """Radii spread evenly in log10."""
    return st.floats(low, high).map(lambda x: 10.0 ** round(x, 3))


alphas = st.one_of(st.integers(1, 1000).map(lambda k: k / 1000), st.sampled_from(ALPHAS))


@st.composite
def pairs(draw, **kwargs):
    """Two rows of the same length."""
    first = draw(rows(**kwargs))
    second = draw(st.lists(_levels, min_size=len(first), max_size=len(first)))
    return first, second


def maximal_radius(name, losses):
    """The smallest radius at which the risk is the maximum loss."""
    z = np.asarray(losses, dtype=float)
    share = len(z) / int((z == z.max()).sum())
    return math.log(share) if name == "kl" else (share - 1) / 2


def tensor(losses, dtype=torch.float64):
    """A float tensor of the row."""
    return torch.as_tensor(np.asarray(losses, dtype=float), dtype=dtype)


def features(pairs, width, seed, dtype=torch.float64):
    """Unit-norm features of images and texts, ``[pairs, width]`` each."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    image, text = torch.nn.functional.normalize(draw, dim=-1).to(dtype)
    return image, text


def close(actual, expected, tolerance):
    """Tensors agree to within the tolerance, relative to the largest entry of all."""
    size = max(float(part.abs().max()) for part in expected) + 1e-300
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * size


def paired_sample(n=60, seed=0, scale=1.0, offset=0.0):
    """Skewed losses and reference losses with correlation near 0.8."""
    rng = np.random.default_rng(seed)
    reference = rng.exponential(size=n)
    return scale * (offset + 0.8 * reference + 0.6 * rng.gamma(2.0, size=n)), scale * (offset + reference)


def differences(n):
    """All samples of a difference of 0-1 losses, up to order: counts of (-1, 0, 1)."""
    return [(low, n - low - high, high) for low in range(n + 1) for high in range(n + 1 - low)]


#: Probabilities of (-1, 0, 1) for a difference of 0-1 losses.
DIFFERENCE_LAWS = [
    (0.5, 0.0, 0.5),
    (0.01, 0.98, 0.01),
    (0.0, 0.99, 0.01),
    (0.3, 0.4, 0.3),
    (0.05, 0.9, 0.05),
    (0.0, 0.5, 0.5),
]


def near(actual, expected, tolerance):
    """Two numbers agree to within an absolute tolerance."""
    __tracebackhide__ = True
    assert abs(actual - expected) <= tolerance, f"{actual} is not {expected} within {tolerance}"


def agree(actual, expected, tolerance):
    """As `close`, with equal dtypes and something to compare."""
    size = max(float(part.abs().max()) for part in expected)
    assert size > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * size


def leaves(pairs=17, width=8, scale=9.0):
    """Features of images and texts and a logit scale, each with a gradient."""
    image, text = features(pairs, width, 0)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)


def normalized_rows(losses, base=None):
    """Losses ``[rows, n]`` as the solvers see them: about their row's maximum, in units of its range."""
    z = tensor(losses)
    top, low = z.amax(-1).numpy(), z.amin(-1).numpy()
    return Rows(z, base, None, z.shape[-1], top, np.where(top > low, top - low, 1.0))
