"""Chi-square: a monotone active set, finite and exact (the argument of Michelot 1986 for simplex projection)."""

from __future__ import annotations

import numpy as np
import torch

from drrho.solvers.rows import Dual, Rows


def chi_square_ball(rows: Rows, radius: np.ndarray) -> Dual:
    """Shrink the support to ``{d >= eta}`` until it stays, ``eta = mean - std / sqrt(c)`` of the support.

    With base weight w in the support, ``c = w (1 + 2 radius) - 1``. Including an entry below the final threshold
    only lowers the threshold, so nothing that belongs to the support is ever dropped.
    """

    def threshold(dropped, mean, variance):
        c = 2 * radius * (1 - dropped) - dropped
        saturated = (c <= 0) | (variance <= 0)
        spread = np.sqrt(np.where(saturated, 1.0, variance) / np.where(saturated, 1.0, c))
        return np.where(saturated, -np.inf, mean - spread), mean - dropped * spread, (1 - dropped) * spread, saturated

    return _active_set(rows, threshold)


def chi_square_penalty(rows: Rows, strength: np.ndarray) -> Dual:
    """Project ``d / (n strength)`` on the simplex: ``eta = mean - strength / w`` of the support of base weight w."""
    none = np.zeros(len(strength), dtype=bool)

    def threshold(dropped, mean, variance):
        spread = strength / (1 - dropped)
        return mean - spread, mean - dropped * spread, strength, none

    return _active_set(rows, threshold)


def _active_set(rows: Rows, threshold) -> Dual:
    """Iterate ``threshold(dropped base weight, mean, variance) -> (eta, nu = eta + lambda, lambda, saturated)``."""
    dropped = np.zeros(len(rows.d))
    (mean,) = rows.means(rows.d)
    y = rows.d - mean[:, None]
    mean, variance = torch.stack([mean, rows.means((y, y))[0]]).cpu().numpy()
    eta, nu, strength, saturated = threshold(dropped, mean, variance)
    inactive = None
    while bool((eta > -1).any()):  # -1 is the least loss
        inactive = torch.sub(rows.column(eta), rows.d, out=inactive).clamp_(min=0).sign_()
        y = torch.addcmul(rows.d, rows.d, inactive, value=-1, out=y)
        share, mean = rows.means(inactive, y)
        mean = mean / (1 - share)
        # About the mean: moments about anything else would cancel where the support's spread is small.
        y = torch.sub(rows.d, mean[:, None], out=y)
        y.addcmul_(y, inactive, value=-1)
        before = dropped
        dropped, mean, variance = torch.stack([share, mean, rows.means((y, y))[0] / (1 - share)]).cpu().numpy()
        eta_before = eta
        eta, nu, strength, saturated = threshold(dropped, mean, variance)
        if bool(((dropped == before) | saturated).all()):
            break
        eta = np.clip(eta, eta_before, 0.0)  # it only grows, and stays below the maximum, but for rounding
    return Dual(nu, strength, None, saturated)
