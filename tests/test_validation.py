"""Bad input is refused by name: the message carries the argument and the value it got."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from drrho import KL, ChiSquare, CVaR, constrained_risk, drrho_risk, excess_losses, penalized_risk
from drrho.contrastive import contrastive_risk, info_nce
from drrho.distillation import distillation_loss
from drrho.selection import top_k
from drrho.validation import deferred_checks, values_are_readable
from drrho.variance import variance_reduction

LOSSES = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
BATCH = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
DIVERGENCES = pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=["kl", "chi2", "cvar"])
BALLS = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])


def assert_refused(call, *mentions, error=ValueError):
    __tracebackhide__ = True
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value).lower()
    for mention in mentions:
        assert str(mention).lower() in message, f"{message!r} does not mention {mention!r}"


@BALLS
@pytest.mark.parametrize("radius", [-0.25, -1e-30, math.nan, -math.inf])
def test_radius_must_be_a_nonnegative_number(divergence, radius):
    assert_refused(lambda: constrained_risk(LOSSES, divergence, radius), "radius", radius)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan])
def test_one_bad_radius_of_a_batch(divergence, bad):
    radius = torch.tensor([0.1, bad], dtype=torch.float64)
    assert_refused(lambda: constrained_risk(BATCH, divergence, radius), "radius", bad)


@BALLS
@pytest.mark.parametrize("strength", [-0.25, math.nan, math.inf, -math.inf])
def test_strength_must_be_finite_and_nonnegative(divergence, strength):
    assert_refused(lambda: penalized_risk(LOSSES, divergence, strength), "strength", strength)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan, math.inf])
def test_one_bad_strength_of_a_batch(divergence, bad):
    strength = torch.tensor([0.1, bad], dtype=torch.float64)
    assert_refused(lambda: penalized_risk(BATCH, divergence, strength), "strength", bad)


@BALLS
def test_radius_of_another_batch_shape(divergence):
    assert_refused(lambda: constrained_risk(BATCH, divergence, torch.full((3,), 0.1)), "radius", "3")
    assert_refused(lambda: penalized_risk(BATCH, divergence, torch.full((3,), 0.1)), "strength", "3")


@BALLS
def test_radius_must_not_add_batch_dimensions(divergence):
    assert_refused(lambda: constrained_risk(LOSSES, divergence, torch.full((4,), 0.1)), "radius", "4")


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, 2.0, math.nan, math.inf])
def test_tail_fraction_must_be_in_zero_one(alpha):
    assert_refused(lambda: CVaR(alpha), "alpha", alpha)


@DIVERGENCES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("convert", [lambda z: z, lambda z: z.float(), lambda z: z.half(), lambda z: z.numpy()])
def test_losses_must_be_finite(divergence, bad, convert):
    losses = BATCH.clone()
    losses[1, 2] = bad
    for call in (constrained_risk, lambda z, d: penalized_risk(z, d, 1.0)):
        assert_refused(lambda call=call: call(convert(losses), divergence), "losses", bad)


@DIVERGENCES
def test_losses_must_not_be_empty(divergence):
    for shape in ((0,), (3, 0)):
        for call in (constrained_risk, lambda z, d: penalized_risk(z, d, 1.0)):
            assert_refused(
                lambda call=call, shape=shape: call(torch.zeros(shape), divergence),
                "losses",
                ", ".join(map(str, shape)),
            )


@DIVERGENCES
def test_losses_must_have_a_dimension(divergence):
    for scalar in (torch.tensor(1.5), np.float64(1.5), 1.5):
        assert_refused(lambda scalar=scalar: constrained_risk(scalar, divergence), "losses")
        assert_refused(lambda scalar=scalar: penalized_risk(scalar, divergence, 1.0), "losses")


@DIVERGENCES
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_losses_must_not_be_an_integer_tensor(divergence, dtype):
    losses = torch.ones(3, dtype=dtype)
    assert_refused(lambda: constrained_risk(losses, divergence), "losses", dtype, error=TypeError)
    assert_refused(lambda: penalized_risk(losses, divergence, 1.0), "losses", dtype, error=TypeError)


def test_losses_must_not_be_complex():
    assert_refused(lambda: constrained_risk(LOSSES + 0j, KL(), 0.1), "losses", "complex", error=TypeError)


@BALLS
def test_exactly_one_of_rho_and_radius(divergence):
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence), "rho", "radius")
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, rho=0.75, radius=0.125), "rho", "radius", 0.75, 0.125)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan])
def test_rho_must_be_a_nonnegative_number(divergence, bad):
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, rho=bad), "rho", bad)
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, radius=bad), "radius", bad)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (2, 4)), ((5, 3), (2, 3))])
def test_reference_losses_must_match(shapes):
    ours, theirs = map(torch.zeros, shapes)
    for call in (excess_losses, lambda a, b: drrho_risk(a, b, KL(), rho=1.0)):
        assert_refused(
            lambda call=call: call(ours, theirs),
            "reference_losses",
            *(", ".join(map(str, shape)) for shape in shapes),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reference_losses_must_be_finite(bad):
    reference = LOSSES.clone()
    reference[0] = bad
    assert_refused(lambda: drrho_risk(LOSSES, reference, KL(), rho=1.0), "losses", bad)


# --- other people's arrays --------------------------------------------------------------------------------------------

ARRAYS = {
    "reversed": lambda array: array[::-1].copy()[::-1],
    "strided": lambda array: np.repeat(array, 2)[::2],
    "a column": lambda array: np.stack([array, array], axis=1)[:, 1],
    "big-endian": lambda array: array.astype(">f8"),
    "read-only": lambda array: np.frombuffer(array.tobytes()),
    "long double": lambda array: array.astype(np.longdouble),
    "masked, nothing hidden": lambda array: np.ma.masked_array(array, mask=False),
    "list": list,
}
Z, R, Q = np.array([0.5, -1.0, 2.0]), np.array([0.1, 0.2, -0.3]), np.array([0.2, 0.3, 0.5])
TAKES_ARRAYS = {
    "losses": lambda a: constrained_risk(a(Z), KL(), 0.1).value,
    "penalty": lambda a: penalized_risk(a(Z), KL(), 0.1).value,
    "excess": lambda a: excess_losses(a(Z), a(R)),
    "base_weights": lambda a: constrained_risk(Z, KL(), 0.1, base_weights=a(Q)).value,
    "radius": lambda a: constrained_risk(np.stack([Z, R, Q]), KL(), a(Q)).value,
    "strength": lambda a: penalized_risk(np.stack([Z, R, Q]), KL(), a(Q)).value,
    "variance": lambda a: torch.tensor(
        variance_reduction(a(np.tile(Z, 9)), a(np.tile(R, 9)), interval="jackknife").ratio.value
    ),
    "scores": lambda a: top_k(a(Z), 2),
    "temperature": lambda a: contrastive_risk(torch.eye(3), torch.eye(3), (a(Q), a(Q))).value,
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("call", TAKES_ARRAYS.values(), ids=TAKES_ARRAYS)
def test_arrays_of_every_layout_are_accepted(call, make):
    assert torch.equal(call(make), call(np.copy))


@pytest.mark.parametrize("call", TAKES_ARRAYS.values(), ids=TAKES_ARRAYS)
def test_masked_and_complex_arrays_are_refused(call):
    assert_refused(
        lambda: call(lambda a: np.ma.masked_array(a, [False, True] + [False] * (len(a) - 2))), "masked", error=TypeError
    )
    for convert in (lambda a: a + 1j, lambda a: list(a + 1j), lambda a: torch.tensor(a + 1j)):
        assert_refused(lambda convert=convert: call(convert), "complex", error=TypeError)


REFUSED = {
    "text": lambda a: a.astype(str),
    "a list of text": lambda a: [str(value) for value in a],
    "bytes": lambda a: a.astype(bytes),
    "times": lambda a: (1000 * a).astype("m8[s]"),
    "dates": lambda a: (1000 * a).astype("M8[s]"),
    "sparse": lambda a: torch.tensor(a).to_sparse(),
    "nested": lambda a: torch.nested.nested_tensor([torch.tensor(a)], layout=torch.jagged),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("call", TAKES_ARRAYS.values(), ids=TAKES_ARRAYS)
def test_what_is_no_dense_numbers_is_refused(call, make):
    with pytest.raises(TypeError, match=r" must be (dense|numbers), got "):
        call(make)


def test_a_number_in_text_is_refused():
    assert_refused(lambda: constrained_risk(LOSSES, KL(), "0.1"), "radius must be numbers, got <u3", error=TypeError)
    assert_refused(lambda: constrained_risk(["1", "2"], KL(), 0.1), "losses must be numbers", error=TypeError)


def test_base_weights_that_require_a_gradient_are_refused():
    base = torch.tensor(Q, requires_grad=True)
    assert_refused(lambda: constrained_risk(Z, KL(), 0.1, base_weights=base), "base_weights", "detach")
    with torch.no_grad():
        assert constrained_risk(Z, KL(), 0.1, base_weights=base).value.isfinite()


# --- deferred checks --------------------------------------------------------------------------------------------------

TAKES_VALUES = {
    "contrastive": lambda image, tau: contrastive_risk(image, torch.eye(3), tau).value,
    "chi-square": lambda image, tau: contrastive_risk(image, torch.eye(3), tau, divergence=ChiSquare()).value,
    "info_nce": lambda image, tau: info_nce(image, torch.eye(3), tau),
    "distillation": lambda image, tau: distillation_loss(
        image, torch.eye(3), tau, reference=(torch.eye(3), torch.eye(3))
    ),
    "risk": lambda image, tau: penalized_risk(image, KL(), tau).value,
    "ball": lambda image, tau: constrained_risk(image, ChiSquare(), tau).value,
}


@pytest.mark.parametrize("call", TAKES_VALUES.values(), ids=TAKES_VALUES)
def test_deferred_checks_give_nan_instead_of_an_error(call):
    right, wrong = torch.eye(3), torch.eye(3).index_fill(1, torch.tensor([1]), math.nan)
    good, bad = torch.tensor(0.1), torch.tensor(-0.1)
    for image, tau in ((wrong, good), (right, bad), (right * math.inf, good)):
        with deferred_checks():
            image = image.clone().requires_grad_()
            value = call(image, tau)
            value.sum().backward()
        assert value.isnan().any()
    with deferred_checks():
        valid = call(right, good)
    assert torch.equal(valid, call(right, good)) and valid.isfinite().all()


def test_deferred_checks_nest_and_count_for_all_threads():
    assert values_are_readable()
    with deferred_checks(), deferred_checks():
        with deferred_checks():
            pass
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(values_are_readable).result()
    assert values_are_readable()


def test_the_checks_of_a_call_are_read_once():
    """What a device would have to be waited for: the values that Python reads."""
    read, tolist = [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or tolist(self))
        for name in ("__bool__", "__float__", "__int__", "item"):
            patch.setattr(torch.Tensor, name, None)
        pair = torch.eye(3), torch.eye(3)
        for divergence in (KL(), ChiSquare()):
            contrastive_risk(*pair, (torch.ones(3), torch.full((3,), 2.0)), reference=pair, divergence=divergence)
            assert len(read) == 1
            read.clear()
