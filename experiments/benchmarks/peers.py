"""Other packages on the same problems, in their own conventions and at their best setting.

A contestant prepares a call from losses and parameter, outside of the clock; its answer becomes a premium in extended
precision, outside of the clock too. Conventions: ``dro``'s loss and cvxpy take our radius, ``dro``'s linear models
twice it for chi-square (their ``phi = (t - 1)^2``); ``skfolio`` takes returns (negated losses) and the confidence
``1 - alpha``, for EVaR ``1 - exp(-radius)``; entmax takes ``losses / (strength * n^(order - 1))``, order 2 or 1.5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from experiments.benchmarks import problems
from experiments.benchmarks.measure import explain, first_sentence, median_seconds
from experiments.benchmarks.oracle import power_divergence
from experiments.benchmarks.problems import Problem, losses, relative_error

_CONE_TOLERANCE = 1e-12


class Attempt(NamedTuple):
    """A call to be timed, and its answer's premium."""

    run: Callable[[], Any]
    premium: Callable[[Any], Any]


@dataclass(frozen=True)
class Contestant:
    """A package's way to solve a problem; ``largest`` is the most losses that are feasible in time."""

    problem: Problem
    name: str
    package: str
    largest: int
    prepare: Callable[[Tensor, float], Attempt]


@dataclass(frozen=True)
class PeerRow:
    """One solver on one kind of input, by number of losses; a failure is a note."""

    problem: str
    losses: str
    parameter: str
    solver: str
    time_ms: dict[str, float]
    premium_error: dict[str, float]
    note: str = ""


class Outcome(NamedTuple):
    """One solver on one input: milliseconds and relative premium error, or none; and what it complained of."""

    time_ms: float | None
    premium_error: float | None
    note: str


def missing() -> str:
    """Return a sentence that names the packages that are not there; empty where all are."""
    names = sorted({peer.package for peer in CONTESTANTS if find_spec(peer.package) is None})
    return f"Not installed, so skipped: {', '.join(names)} (pip install -e '.[bench]')." if names else ""


def compare(sizes: tuple[int, ...], repeats: int) -> list[PeerRow]:
    """Return every installed contestant on every input it is feasible for, the library first."""
    rows = []
    for problem, inputs in INPUTS.items():
        field = [peer for peer in CONTESTANTS if peer.problem is problem and find_spec(peer.package)]
        rows += [_row(peer, kind, value, sizes, repeats) for kind, value in inputs for peer in [_ours(problem), *field]]
    return rows


def _ours(problem: Problem) -> Contestant:
    def prepare(z: Tensor, value: float) -> Attempt:
        return Attempt(lambda: problem.solve(z, value), lambda risk: risk.premium.item())

    return Contestant(problem, "drrho", "drrho", _ANY, prepare)


def _row(peer: Contestant, kind: str, value: float, sizes: tuple[int, ...], repeats: int) -> PeerRow:
    outcomes = {n: _outcome(peer, kind, value, n, repeats) for n in sizes if n <= peer.largest}
    notes: dict[str, list[str]] = {}
    for n, outcome in outcomes.items():
        if outcome.note:
            notes.setdefault(outcome.note, []).append(f"{n:,}")
    return PeerRow(
        peer.problem.name,
        kind,
        f"{peer.problem.parameter} {value:g}",
        peer.name,
        {f"ms, n = {n:,}": done.time_ms for n, done in outcomes.items() if done.time_ms is not None},
        {f"error, n = {n:,}": done.premium_error for n, done in outcomes.items() if done.premium_error is not None},
        "; ".join(f"n = {' and '.join(where)}: {note}" for note, where in notes.items()),
    )


def _outcome(peer: Contestant, kind: str, value: float, n: int, repeats: int) -> Outcome:
    exact = peer.problem.exact_premium(kind, n, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attempt = peer.prepare(losses(kind, n), value)
            caught.clear()
            answer = attempt.run()
            complaint = next((str(warning.message) for warning in caught), "")
            (time,) = median_seconds([attempt.run], repeats)
            error = relative_error(attempt.premium(answer), exact)
        except Exception as failure:  # a peer's failure is a result
            return Outcome(None, None, explain(failure))
    return Outcome(1e3 * time, error, first_sentence(complaint))


def _above_mean(z: Tensor) -> Callable[[Any], Any]:
    """Return the premium of a value."""
    mean = z.numpy().astype(np.longdouble).mean()
    return lambda value: np.longdouble(value) - mean


# --- dro: a loss for training (the "fast-dro" of Levy et al. 2020), and linear models by cvxpy ---------------


def _dro_loss(geometry: str, tolerance: Callable[[float], float]) -> Callable[[Tensor, float], Attempt]:
    def prepare(z: Tensor, value: float) -> Attempt:
        from dro.neural_model.fdro_utils import RobustLoss  # pyright: ignore[reportMissingImports]

        # The public call takes predictions and targets; this is the step from losses to risk inside it.
        risk = RobustLoss(value, 0.0, geometry, tol=tolerance(value))._compute_robust_loss
        return Attempt(lambda: risk(z), lambda answer: _above_mean(z)(answer.item()))

    return prepare


def _dro_linear(module: str, model: str, setting: str, scale: float) -> Callable[[Tensor, float], Attempt]:
    """Fit absolute residuals with features that are all zero: what is left is the risk of the losses."""

    def prepare(z: Tensor, value: float) -> Attempt:
        from importlib import import_module

        if bool((z < 0).any()):
            raise ValueError("the linear models form their own losses, which are >= 0")
        targets, features = z.numpy(), np.zeros((len(z), 1))
        fitted = getattr(import_module(f"dro.linear_model.{module}"), model)(1, model_type="lad", fit_intercept=False)
        fitted.update({setting: scale * value})

        def run() -> float:
            fitted.fit(features, targets)
            return fitted.robust_obj

        return Attempt(run, _above_mean(z))

    return prepare


# --- skfolio ------------------------------------------------------------------------------------------------


def _skfolio(measure: str, confidence: Callable[[float], float]) -> Callable[[Tensor, float], Attempt]:
    def prepare(z: Tensor, value: float) -> Attempt:
        from skfolio import measures  # pyright: ignore[reportMissingImports]

        function, returns, beta = getattr(measures, measure), -z.numpy(), confidence(value)
        return Attempt(lambda: function(returns, beta=beta), _above_mean(z))

    return prepare


# --- entmax: penalties as projections on the simplex ----------------------------------------------------------


def _entmax(function: str, order: float, **settings: Any) -> Callable[[Tensor, float], Attempt]:
    def prepare(z: Tensor, strength: float) -> Attempt:
        import entmax  # pyright: ignore[reportMissingImports]

        scores, project, n = z / (strength * len(z) ** (order - 1)), getattr(entmax, function), len(z)

        def premium(weights: Tensor) -> Any:
            tilt = weights.numpy().astype(np.longdouble) * n - 1
            centered = z.numpy().astype(np.longdouble)
            centered -= centered.mean()
            return (tilt * centered).mean() - np.longdouble(strength) * power_divergence(tilt, order)

        return Attempt(lambda: project(scores, dim=-1, **settings), premium)

    return prepare


# --- cvxpy: standardized losses, scaled variables, tight tolerances where CLARABEL can keep them -------------


def _cvxpy(program: Callable[[Any, Any, float], tuple[Any, float]]) -> Callable[[Tensor, float], Attempt]:
    def prepare(z: Tensor, value: float) -> Attempt:
        import cvxpy as cp

        centered = z.numpy() - z.numpy().mean()
        deviation = centered.std()
        tight: dict[str, float] = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), _CONE_TOLERANCE)

        def run(accuracy: dict[str, float]) -> float:
            task, unit = program(cp, centered / deviation, value)
            task.solve(solver=cp.CLARABEL, **accuracy)
            return task.value * unit * deviation

        try:
            run(tight)
        except cp.SolverError:
            return Attempt(lambda: run({}), lambda premium: premium)
        return Attempt(lambda: run(tight), lambda premium: premium)

    return prepare


def _chi_square_program(cp: Any, z: Any, radius: float) -> tuple[Any, float]:
    unit = np.sqrt(2 * radius)
    tilt = cp.Variable(len(z))  # (n p - 1) / unit
    ball = [cp.sum(tilt) == 0, cp.norm(tilt, 2) <= np.sqrt(len(z)), tilt >= -1 / unit]
    return cp.Problem(cp.Maximize(z @ tilt / len(z)), ball), unit


def _kl_program(cp: Any, z: Any, radius: float) -> tuple[Any, float]:
    ratio = cp.Variable(len(z))
    ball = [cp.sum(ratio) == len(z), cp.sum(cp.kl_div(ratio, 1)) <= len(z) * radius]
    return cp.Problem(cp.Maximize(z @ ratio / len(z)), ball), 1.0


def _cvar_program(cp: Any, z: Any, alpha: float) -> tuple[Any, float]:
    ratio = cp.Variable(len(z))
    return cp.Problem(cp.Maximize(z @ ratio / len(z)), [cp.sum(ratio) == len(z), ratio >= 0, ratio <= 1 / alpha]), 1.0


_BALLS = (("exponential", 1e-2), ("narrow negative", 1e-2), ("exponential", 1e-6), ("narrow negative", 1e-6))
_PENALTIES = (("exponential", 1.0), ("exponential", 0.01), ("narrow negative", 0.01))

#: Kinds of losses and parameters, by problem.
INPUTS = {
    problems.CHI_SQUARE_BALL: _BALLS,
    problems.KL_BALL: _BALLS,
    problems.CVAR: (("exponential", 0.1), ("narrow negative", 0.1)),
    problems.CHI_SQUARE_PENALTY: _PENALTIES,
    problems.POWER_PENALTY: _PENALTIES,
}

_CONES = 10_000
_ANY = 10_000_000
CONTESTANTS = (
    Contestant(
        problems.CHI_SQUARE_BALL,
        "dro RobustLoss, tol 1e-10 radius",
        "dro",
        _ANY,
        _dro_loss("chi-square", lambda radius: 1e-10 * radius),
    ),
    Contestant(
        problems.CHI_SQUARE_BALL,
        "dro RobustLoss, default tol",
        "dro",
        _ANY,
        _dro_loss("chi-square", lambda radius: 1e-2),
    ),
    Contestant(problems.CHI_SQUARE_BALL, "dro Chi2DRO", "dro", _CONES, _dro_linear("chi2_dro", "Chi2DRO", "eps", 2.0)),
    Contestant(problems.CHI_SQUARE_BALL, "cvxpy CLARABEL", "cvxpy", _CONES, _cvxpy(_chi_square_program)),
    Contestant(
        problems.KL_BALL, "skfolio evar", "skfolio", _ANY, _skfolio("evar", lambda radius: -float(np.expm1(-radius)))
    ),
    Contestant(problems.KL_BALL, "dro KLDRO", "dro", _CONES, _dro_linear("kl_dro", "KLDRO", "eps", 1.0)),
    Contestant(problems.KL_BALL, "cvxpy CLARABEL", "cvxpy", _CONES, _cvxpy(_kl_program)),
    Contestant(problems.CVAR, "dro RobustLoss", "dro", _ANY, _dro_loss("cvar", lambda alpha: 1e-2)),
    Contestant(problems.CVAR, "skfolio cvar", "skfolio", _ANY, _skfolio("cvar", lambda alpha: 1 - alpha)),
    Contestant(problems.CVAR, "dro CVaRDRO", "dro", _CONES, _dro_linear("cvar_dro", "CVaRDRO", "alpha", 1.0)),
    Contestant(problems.CVAR, "cvxpy CLARABEL", "cvxpy", _CONES, _cvxpy(_cvar_program)),
    Contestant(problems.CHI_SQUARE_PENALTY, "entmax sparsemax", "entmax", _ANY, _entmax("sparsemax", 2)),
    Contestant(
        problems.CHI_SQUARE_PENALTY, "entmax sparsemax, k = 1000", "entmax", _ANY, _entmax("sparsemax", 2, k=1000)
    ),
    Contestant(problems.CHI_SQUARE_PENALTY, "entmax sparsemax_bisect", "entmax", _ANY, _entmax("sparsemax_bisect", 2)),
    Contestant(problems.POWER_PENALTY, "entmax entmax15", "entmax", _ANY, _entmax("entmax15", 1.5)),
    Contestant(problems.POWER_PENALTY, "entmax entmax15, k = 1000", "entmax", _ANY, _entmax("entmax15", 1.5, k=1000)),
    Contestant(
        problems.POWER_PENALTY, "entmax entmax_bisect", "entmax", _ANY, _entmax("entmax_bisect", 1.5, alpha=1.5)
    ),
)
