"""Model steering: distributionally robust optimization of the excess loss over a reference model."""

from drrho.divergences import KL, CappedKL, ChiSquare, CressieRead, CVaR, Divergence, TotalVariation
from drrho.reference import excess_losses
from drrho.risk import RobustRisk, constrained_risk, drrho_risk, hybrid_risk, penalized_risk

__version__ = "0.2.0"

__all__ = [
    "KL",
    "CVaR",
    "CappedKL",
    "ChiSquare",
    "CressieRead",
    "Divergence",
    "RobustRisk",
    "TotalVariation",
    "constrained_risk",
    "drrho_risk",
    "excess_losses",
    "hybrid_risk",
    "penalized_risk",
]
