"""Weights for estimators that take ``sample_weight``: scikit-learn's, and others with its interface."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrho.divergences import Divergence
from drrho.integrations.steering import Steering
from drrho.validation import ArrayLike, as_row

__all__ = ["drrho_weights"]


def drrho_weights(
    losses: ArrayLike, reference_losses: ArrayLike, divergence: Divergence, **risk: Any
) -> NDArray[np.float64]:
    """Return n times the worst-case weights of the excess losses, ``[n]``: their mean is 1, as without weights.

    An estimator is fitted without weights, its losses give the weights, and it is fitted again with
    ``sample_weight=``. `drrho.linear` minimizes the risk of linear models exactly; this is one step towards it for any
    estimator.

    Parameters
    ----------
    losses, reference_losses : array, tensor or sequence ``[n]``
        Losses of the estimator and of the reference on the samples. Those of a model on its own training samples are
        too small: `drrho.choosing.cross_fitted` computes them by models that have not seen the sample.
    divergence : Divergence
        As for `drrho.integrations.Steering`.
    **risk
        ``radius``, ``strength``, ``rho`` and ``coefficient`` as for `drrho.integrations.Steering`.

    Raises
    ------
    ValueError, TypeError
        As for `drrho.integrations.Steering`.

    Examples
    --------
    >>> from drrho import KL
    >>> drrho_weights([2.0, 2.0, 2.0], [0.1, 1.0, 4.0], KL(), strength=1.0).round(3)
    array([2.103, 0.855, 0.043])
    """
    row, reference = (
        as_row(values, name).detach().cpu().double()
        for values, name in ((losses, "losses"), (reference_losses, "reference_losses"))
    )
    step = Steering(divergence, group=None, **risk)(row, reference.numpy())
    return len(row) * step.weights.numpy()
