"""Is my model better than its reference, and how sure is that?

    python examples/certify_against_reference.py

Both are scored on samples that trained neither. A certificate holds for this number of samples; it needs no large n.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from drrho.bounds import better_than_reference
from drrho.variance import variance_reduction

x, y = load_digits(return_X_y=True)
x = x / 16
order = np.random.default_rng(0).permutation(len(x))
few, many, test = order[:40], order[40:800], order[800:]
reference = LogisticRegression().fit(x[few], y[few])
model = LogisticRegression().fit(x[many], y[many])


def errors(fitted: LogisticRegression, rows: np.ndarray) -> np.ndarray:
    """Return 1 where a sample is named wrong."""
    return (fitted.predict(x[rows]) != y[rows]).astype(float)


for rows in (test[:20], test):
    ours, theirs = errors(model, rows), errors(reference, rows)
    verdict = better_than_reference(ours, theirs, value_range=(-1, 1), reference_independent=True)
    print(f"{len(rows)} samples: {ours.mean():.1%} wrong, the reference {theirs.mean():.1%}")
    print(f"  at 95 %, R(model) - R(reference) <= {verdict.bound.value:+.3f}; certified better: {verdict.certified}")
ratio = variance_reduction(ours, theirs).ratio
print(f"variance of the difference over that of the errors: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
