"""Which rho should I take?

    python examples/choose_rho.py

By held-out losses, if robustness is to help; by coverage, if the risk of one given model is to hold its expected loss.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

from drrho.choosing import calibrated_rho, choose_rho
from drrho.linear import DRRhoClassifier

x, y = load_breast_cancer(return_X_y=True)
x = scale(x)


def losses_of(rho: float, train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return held-out cross-entropies of the model that is trained with a rho."""
    model = DRRhoClassifier(rho=rho, l2=0.03).fit(x[train], y[train])
    return -model.predict_log_proba(x[held_out])[np.arange(len(held_out)), y[held_out]]


choice = choose_rho([0.0, 1.0, 3.0, 10.0], losses_of, len(x))
for rho, mean in zip(choice.candidates, choice.means, strict=True):
    print(f"rho {rho:4.1f}: held-out loss {mean:.4f}")
print(f"least at rho {choice.best:.1f}; chosen, within a standard error of it: {choice.rho:.1f}")

train, test = np.arange(300), np.arange(300, len(x))
calibrated = calibrated_rho(losses_of(choice.rho, train, test))
print(
    f"rho to cover the expected loss in 95 % of samples: {calibrated.rho:.2f}; of normal ones: {calibrated.normal:.2f}"
)
