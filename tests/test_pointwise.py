"""Losses of predictions: derivatives by differences, conjugates by Fenchel's inequality and by their maximum."""

import numpy as np
import pytest

from drrho.pointwise import Hinge, Logistic, SmoothedHinge, Squared

RNG = np.random.default_rng(0)
LOSSES = [(Squared(), 1), (Squared(), 3), (Logistic(), 1), (Logistic(), 3), (Hinge(), 1), (Hinge(), 3)]
every_loss = pytest.mark.parametrize("loss, k", LOSSES, ids=lambda value: getattr(value, "name", value))


def targets(loss, n, k):
    if isinstance(loss, Squared):
        return RNG.normal(size=(n, k))
    one_hot = isinstance(loss, Logistic) and k > 1
    return np.eye(k)[RNG.integers(k, size=n)] if one_hot else RNG.choice([-1.0, 1.0], size=(n, k))


def smoothed(k):
    return SmoothedHinge(0.7, RNG.uniform(size=(7, k)))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "loss", [Squared(), Logistic(), "smoothed hinge"], ids=["squared", "logistic", "smoothed hinge"]
)
def test_slopes_are_derivatives_of_the_values(loss, k):
    loss = smoothed(k) if loss == "smoothed hinge" else loss
    f, y, h = RNG.normal(size=(7, k)), targets(loss, 7, k), 1e-5
    slopes = loss.slopes(f, y)
    np.testing.assert_array_equal(slopes.values, loss.values(f, y))
    curvature = slopes.curvature if slopes.curvature.ndim == 3 else slopes.curvature[:, :, None] * np.eye(k)
    for column in range(k):
        step = h * np.eye(k)[column]
        above, below = loss.slopes(f + step, y), loss.slopes(f - step, y)
        np.testing.assert_allclose(slopes.gradient[:, column], (above.values - below.values) / (2 * h), atol=1e-9)
        np.testing.assert_allclose(curvature[:, column], (above.gradient - below.gradient) / (2 * h), atol=1e-9)


def test_the_hinge_loss_has_kinks():
    f = np.array([[2.0], [0.5], [-1.0]])
    assert Hinge().values(f, np.ones((3, 1))).tolist() == [0.0, 0.5, 2.0]
    assert Hinge().slopes(f, np.ones((3, 1))) is None


@every_loss
def test_conjugates_satisfy_fenchels_inequality_with_equality_at_slopes(loss, k):
    f, y = RNG.normal(size=(50, k)), targets(loss, 50, k)
    slopes = loss.slopes(f, y)
    s = slopes.gradient if slopes else -y * (y * f < 1)
    np.testing.assert_allclose(loss.allowed(s, y), s, atol=1e-15)
    np.testing.assert_allclose(loss.conjugate(s, y), (s * f).sum(1) - loss.values(f, y), atol=1e-12)
    for _ in range(20):
        other = RNG.normal(size=f.shape) * 3
        assert (loss.conjugate(s, y) >= (s * other).sum(1) - loss.values(other, y) - 1e-12).all()


@every_loss
def test_slopes_are_moved_to_where_the_conjugate_is_finite(loss, k):
    y = targets(loss, 200, k)
    s = loss.allowed(RNG.normal(size=(200, k)) * 3, y)
    np.testing.assert_allclose(loss.allowed(s, y), s, atol=1e-15)
    far = 1e6 * RNG.normal(size=(200, k))  # an infinite conjugate would show there
    assert ((s * far).sum(1) - loss.values(far, y) <= loss.conjugate(s, y) + 1e-6).all()
    none = np.zeros((200, k))  # no loss is negative
    assert (loss.conjugate(loss.allowed(none, y), y) == 0).all()


def test_the_smoothed_hinge_is_below_and_touches_at_its_center():
    f, y = RNG.normal(size=(7, 2)), targets(Hinge(), 7, 2)
    loss = smoothed(2)
    difference = Hinge().values(f, y) - loss.values(f, y)
    assert (difference >= 0).all() and (difference <= 2 * loss.width / 2).all()
    own = SmoothedHinge(0.7, (y * f < 1).astype(float))
    np.testing.assert_allclose(own.values(f, y), Hinge().values(f, y), atol=1e-15)
