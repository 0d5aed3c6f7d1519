"""Model steering: distributionally robust optimization of the excess loss over a reference model."""

from drrho.divergences import KL, ChiSquare, CVaR, Divergence
from drrho.reference import excess_losses
from drrho.risk import RobustRisk, constrained_risk, drrho_risk, penalized_risk

__all__ = [
    "KL",
    "CVaR",
    "ChiSquare",
    "Divergence",
    "RobustRisk",
    "constrained_risk",
    "drrho_risk",
    "excess_losses",
    "penalized_risk",
]
