"""Every divergence with its definition in mpmath, and divergences as a user of the library would write them.

The user's classes state `phi`, `conjugate` and `conjugate_gradient` by their plain formulas and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp
import oracles
import pytest
import torch

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, Divergence, TotalVariation


class UserKL(Divergence):
    """t log t - t + 1."""

    def phi(self, t):
        return torch.where(t < 0, torch.inf, torch.xlogy(t.clamp(min=0), t.clamp(min=0)) - t + 1)

    def conjugate(self, s):
        return torch.exp(s) - 1

    def conjugate_gradient(self, s):
        return torch.exp(s)


class UserChiSquare(Divergence):
    """(t - 1)^2 / 2."""

    def phi(self, t):
        return torch.where(t < 0, torch.inf, (t - 1) ** 2 / 2)

    def conjugate(self, s):
        return ((1 + s).clamp(min=0) ** 2 - 1) / 2

    def conjugate_gradient(self, s):
        return (1 + s).clamp(min=0)


class UserHellinger(Divergence):
    """2 (sqrt t - 1)^2, its conjugate infinite from 2 on."""

    def phi(self, t):
        return torch.where(t < 0, torch.inf, 2 * (t.clamp(min=0).sqrt() - 1) ** 2)

    def conjugate(self, s):
        return torch.where(s < 2, 2 * s / (2 - s), torch.inf)

    def conjugate_gradient(self, s):
        return torch.where(s < 2, 4 / (2 - s) ** 2, torch.inf)


class JensenShannon(Divergence):
    """t log t - (1 + t) log((1 + t) / 2): curvature 1/2 at one, its conjugate infinite from log 2 on."""

    def phi(self, t):
        u = t.clamp(min=0)
        return torch.where(t < 0, torch.inf, torch.xlogy(u, u) - (1 + u) * torch.log((1 + u) / 2))

    def conjugate(self, s):
        rest = 2 - torch.exp(s)
        return torch.where(rest > 0, -torch.log(rest.clamp(min=0)), torch.inf)

    def conjugate_gradient(self, s):
        rest = 2 - torch.exp(s)
        return torch.where(rest > 0, torch.exp(s) / rest, torch.inf)


class LeCam(Divergence):
    """(t - 1)^2 / (t + 1): finite slope -3 at zero, so that weights vanish, and a conjugate infinite beyond 1."""

    def phi(self, t):
        return torch.where(t < 0, torch.inf, (t - 1) ** 2 / (t.clamp(min=0) + 1))

    def conjugate(self, s):
        inner = 4 - s - 4 * torch.sqrt((1 - s).clamp(min=0))
        return torch.where(s > 1, torch.inf, torch.where(s > -3, inner, -1.0))

    def conjugate_gradient(self, s):
        inner = 2 / torch.sqrt((1 - s).clamp(min=0)) - 1
        return torch.where(s > 1, torch.inf, inner.clamp(min=0))


def jensen_shannon_phi(t):
    return (t * mp.log(t) if t > 0 else mp.mpf(0)) - (1 + t) * mp.log((1 + t) / 2) if t >= 0 else mp.inf


def jensen_shannon_conjugate(s):
    return -mp.log(2 - mp.exp(s)) if s < mp.log(2) else mp.inf


def le_cam_phi(t):
    return (t - 1) ** 2 / (t + 1) if t >= 0 else mp.inf


def le_cam_conjugate(s):
    return mp.inf if s > 1 else mp.mpf(-1) if s <= -3 else 4 - s - 4 * mp.sqrt(1 - s)


def hellinger_conjugate(s):
    return 2 * s / (2 - s) if s < 2 else mp.inf


class Family(NamedTuple):
    """A divergence of the library or of a user, and phi and phi* in mpmath."""

    divergence: Divergence
    phi: Callable
    conjugate: Callable
    cap: float = mp.inf  # the end of the domain of phi


def _power(order):
    return Family(CressieRead(order), oracles.power_phi(order), oracles.power_conjugate(order))


def _capped(alpha):
    rounded = oracles.capped_kl_phi(alpha * (1 - 1e-12))  # a weight at the cap may exceed it by its rounding
    return Family(CappedKL(alpha), rounded, oracles.capped_kl_conjugate(alpha), 1 / mp.mpf(alpha))


ORDERS = [3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -1.0]
POWERS = {f"order {order:g}": _power(order) for order in ORDERS}
CAPPED = {"capped kl 0.3": _capped(0.3), "capped kl 0.02": _capped(0.02)}
NAMED = {
    "kl": Family(KL(), oracles.kl_phi, mp.expm1),
    "chi2": Family(ChiSquare(), oracles.chi_square_phi, oracles.chi_square_conjugate),
}
USERS = {
    "user kl": Family(UserKL(), oracles.kl_phi, mp.expm1),
    "user chi2": Family(UserChiSquare(), oracles.chi_square_phi, oracles.chi_square_conjugate),
    "user hellinger": Family(UserHellinger(), oracles.power_phi(0.5), hellinger_conjugate),
    "jensen-shannon": Family(JensenShannon(), jensen_shannon_phi, jensen_shannon_conjugate),
    "le cam": Family(LeCam(), le_cam_phi, le_cam_conjugate),
}
# What has a ball and one pair of multipliers that certifies it.
SMOOTH = NAMED | POWERS | CAPPED | USERS
EVERY = {name: family.divergence for name, family in SMOOTH.items()} | {"cvar": CVaR(0.35), "tv": TotalVariation()}
# One of each kind, where the kind is the point.
KINDS = (
    *("kl", "chi2", "cvar", "tv", "order 3", "order 0.5", "order 0", "order -1"),
    *("capped kl 0.3", "jensen-shannon", "le cam"),
)
SMOOTH_KINDS = tuple(name for name in KINDS if name in SMOOTH)


#: One closed form and one iteration: what a test of many divergences always tries.
QUICK = ("kl", "order 0.5")


def thorough(names, quick=QUICK):
    """Parameters of which those outside ``quick`` are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def thorough_items(table, *quick):
    """Values of a table as parameters with its names as ids, of which those outside ``quick`` are slow."""
    parameters = []
    for name, value in table.items():
        marks = () if name in quick else (pytest.mark.slow,)
        parameters.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), id=name, marks=marks))
    return parameters
