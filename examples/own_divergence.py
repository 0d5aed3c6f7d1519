"""How do I use a divergence of my own?

    python examples/own_divergence.py

phi, its conjugate and the conjugate's gradient are all that the solver needs. Here is the Jensen-Shannon divergence,
phi(t) = t log t - (1 + t) log((1 + t) / 2), in every risk and with its certificate.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drrho import Divergence, constrained_risk, penalized_risk


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """phi(t) = t log t - (1 + t) log((1 + t) / 2)."""

    def phi(self, t: Tensor) -> Tensor:
        """Return phi."""
        return torch.special.xlogy(t, t) - (1 + t) * torch.log((1 + t) / 2)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return max_t s t - phi(t), infinite from log 2 on."""
        inside = s < math.log(2)
        return torch.where(inside, -torch.log(2 - torch.exp(torch.where(inside, s, 0))), torch.inf)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return the t that attains it."""
        inside = s < math.log(2)
        exponential = torch.exp(torch.where(inside, s, 0))
        return torch.where(inside, exponential / (2 - exponential), torch.inf)


losses = torch.tensor([0.2, 0.5, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
for name, risk in {
    "ball   ": constrained_risk(losses, JensenShannon(), 0.05),
    "penalty": penalized_risk(losses, JensenShannon(), 5.0),
}.items():
    weights = ", ".join(f"{weight:.3f}" for weight in risk.weights.tolist())
    print(f"{name} value {risk.value:.4f}, weights {weights}, wrong by less than 1e-8: {abs(risk.gap.item()) < 1e-8}")
(gradient,) = torch.autograd.grad(constrained_risk(losses, JensenShannon(), 0.05).value, losses)
print("gradient with respect to the losses:", ", ".join(f"{part:.3f}" for part in gradient.tolist()))
