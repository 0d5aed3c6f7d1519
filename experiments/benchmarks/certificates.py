"""Search for risks whose gap is negative, or whose value is not what primal and dual prove, over random problems.

``OMP_NUM_THREADS=1 python experiments/benchmarks/certificates.py`` draws 15,000 problems for each divergence of the
library and 2,000 for each of a user's, and writes results/certificates.md. That takes 15 minutes: what is done stands
in outputs/certificates.jsonl, and the same command resumes after it; remove the file where the library has changed.
The answers are judged from the definitions alone, in extended precision: the weights returned, scaled back into the
ball, attain a value, the multipliers returned give a bound on every value, and what lies between the two is an upper
bound on the error, whatever found them. Nothing is solved, and no code of the library is used.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    Divergence,
    RobustRisk,
    TotalVariation,
    constrained_risk,
    penalized_risk,
)
from experiments.benchmarks import users
from experiments.benchmarks.measure import markdown, provenance

RESULTS = Path(__file__).parent / "results" / "certificates.md"
PROGRESS = Path("outputs") / "certificates.jsonl"
SLICE = 100  # problems that are drawn by one generator, and done before they are written down
EPS = 2.0**-52
SIZES = (1, 2, 3, 5, 100, 10_000, 300_000)
SHARES = (0.02, 0.2, 0.2, 0.2, 0.33, 0.045, 0.005)
ACCURACY = 1e-8  # error of a premium, relative, beside the rounding of the losses
Extended = np.longdouble
Function = Callable[[Any], Any]


class Exact(NamedTuple):
    """Phi and phi* in extended precision, and the largest ratio, at which phi ends."""

    phi: Function
    conjugate: Function
    cap: float = np.inf


def power(order: float) -> Exact:
    """Return Cressie-Read's of an order."""
    k = Extended(order)

    def quotient(p: Any, logarithm: Any) -> Any:
        return logarithm if p == 0 else np.expm1(p * logarithm) / p

    def phi(t: Any) -> Any:
        logarithm = np.log(t)
        if k == 0:
            return t - 1 - logarithm
        inner = (t * quotient(k - 1, logarithm) - (t - 1)) / k
        return np.where(t > 0, inner, 1 / k if k > 0 else np.inf)

    def conjugate(s: Any) -> Any:
        base = 1 + (k - 1) * s
        if k == 1:
            return np.expm1(s)
        value = quotient(k, np.log1p(np.maximum((k - 1) * s, -1)) / (k - 1))
        return value if k > 1 else np.where((base < 0) | ((base == 0) & (k >= 0)), np.inf, value)

    return Exact(phi, conjugate)


def capped_kl(alpha: float) -> Exact:
    """Return that of `CappedKL`; its weights may exceed the cap by their rounding."""
    cap = 1 / Extended(alpha)

    def conjugate(s: Any) -> Any:
        limit = np.log(cap)
        return np.expm1(np.minimum(s, limit)) + cap * np.maximum(s - limit, 0)

    return Exact(lambda t: np.where(t <= cap * (1 + 1e-10), power(1).phi(t), np.inf), conjugate, float(cap))


def cvar(alpha: float) -> Exact:
    """Return that of `CVaR`."""
    cap = 1 / Extended(alpha)
    phi = lambda t: np.where(t <= cap * (1 + 1e-10), 0.0, np.inf)  # noqa: E731
    return Exact(phi, lambda s: cap * np.maximum(s, 0), float(cap))


def _le_cam_conjugate(s: Any) -> Any:
    inner = 4 - s - 4 * np.sqrt(np.maximum(1 - s, 0))
    return np.where(s > 1, np.inf, np.where(s > -3, inner, -1))


def _jensen_shannon_phi(t: Any) -> Any:
    return np.where(t > 0, t * np.log(t), 0) - (1 + t) * np.log((1 + t) / 2)


def _jensen_shannon_conjugate(s: Any) -> Any:
    rest = 2 - np.exp(s)
    return np.where(rest > 0, -np.log(rest), np.inf)


def _by_newton(phi: Function, slope: Function, curvature: Function) -> Function:
    """Return phi* of a phi whose slope takes every value: Newton on the slope, in the logarithm of t."""

    def conjugate(s: Any) -> Any:
        low, high = np.full_like(s, -12000), np.full_like(s, 12000)
        v = np.zeros_like(s)
        for step in range(80):
            t = np.exp(v)
            off = slope(t) - s
            low, high = np.where(off < 0, v, low), np.where(off < 0, high, v)
            newton = v - off / (curvature(t) * t)
            good = (newton > low) & (newton < high) & (np.abs(newton - v) < 4) & (step % 4 < 3)
            v = np.where(good, newton, np.clip((low + high) / 2, v - 4, v + 4))
        t = np.exp(v)
        return s * t - phi(t)

    return conjugate


def _jeffreys_phi(t: Any) -> Any:
    return np.where(t > 0, (t - 1) * np.log(t), np.inf)


def _symmetric_phi(t: Any) -> Any:
    return np.where(t > 0, (t - 1) ** 2 * (1 + 1 / t), np.inf)


JEFFREYS = Exact(_jeffreys_phi, _by_newton(_jeffreys_phi, lambda t: np.log(t) + 1 - 1 / t, lambda t: 1 / t + 1 / t**2))
SYMMETRIC = Exact(_symmetric_phi, _by_newton(_symmetric_phi, lambda t: 2 * t - 1 - 1 / t**2, lambda t: 2 + 2 / t**3))
LE_CAM = Exact(lambda t: (t - 1) ** 2 / (t + 1), _le_cam_conjugate)
TRIANGULAR = Exact(lambda t: LE_CAM.phi(t) / 2, lambda s: _le_cam_conjugate(2 * s) / 2)
TOTAL_VARIATION = Exact(
    lambda t: np.abs(t - 1) / 2, lambda s: np.where(s > 0.5 + 8 * EPS, np.inf, np.clip(s, -0.5, 0.5))
)


def _fixed(divergence: Divergence, exact: Exact) -> Callable[[np.random.Generator], tuple[Divergence, Exact]]:
    return lambda rng: (divergence, exact)


def _cressie_read(rng: np.random.Generator) -> tuple[Divergence, Exact]:
    near = 1 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-16, -1)
    order = (rng.uniform(-3, 50), rng.uniform(-3, 4), near, float(rng.integers(-3, 8)))[rng.integers(4)]
    return CressieRead(order), power(order)


def _with_alpha(kind: Callable[[float], Divergence], exact: Callable[[float], Exact]) -> Any:
    def draw(rng: np.random.Generator) -> tuple[Divergence, Exact]:
        alpha = 10.0 ** rng.uniform(-3, 0)
        return kind(alpha), exact(alpha)

    return draw


def _amari(rng: np.random.Generator) -> tuple[Divergence, Exact]:
    alpha = float(rng.choice([-3, -1.5, -0.5, 0.0, 0.5, 2.0, 3.0, 4.0]))
    return users.Alpha(alpha), power((1 + alpha) / 2)


DRAWS = {
    "KL": _fixed(KL(), power(1)),
    "chi-square": _fixed(ChiSquare(), power(2)),
    "Cressie-Read, orders -3 to 50": _cressie_read,
    "CVaR": _with_alpha(CVaR, cvar),
    "total variation": _fixed(TotalVariation(), TOTAL_VARIATION),
    "capped KL": _with_alpha(CappedKL, capped_kl),
    "user's Le Cam": _fixed(users.LeCam(), LE_CAM),
    "user's triangular": _fixed(users.Triangular(), TRIANGULAR),
    "user's Jensen-Shannon": _fixed(users.JensenShannon(), Exact(_jensen_shannon_phi, _jensen_shannon_conjugate)),
    "user's Jeffreys": _fixed(users.Jeffreys(), JEFFREYS),
    "user's symmetric chi-square": _fixed(users.SymmetricChiSquare(), SYMMETRIC),
    "user's alpha": _amari,
}


class Problem(NamedTuple):
    """Losses, base weights or None, and a radius or a strength."""

    losses: np.ndarray
    base: np.ndarray | None
    is_ball: bool
    parameter: float

    def solve(self, divergence: Divergence) -> RobustRisk:
        """Return the library's answer."""
        risk = constrained_risk if self.is_ball else penalized_risk
        return risk(self.losses, divergence, self.parameter, base_weights=self.base)


def draw_losses(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return losses of one of several kinds, scaled and perhaps shifted."""
    kinds: tuple[Callable[[], np.ndarray], ...] = (
        lambda: rng.normal(size=n),
        lambda: rng.exponential(size=n),
        lambda: rng.integers(-2, 3, size=n).astype(float),
        lambda: rng.standard_t(1.2, size=n),
        lambda: np.exp(3 * rng.normal(size=n)),
        lambda: -(0.5 ** (40 * rng.random(n))),
        lambda: np.repeat(rng.normal(size=(n + 1) // 2), 2)[:n],
        lambda: 5 + 1e-3 * rng.normal(size=n),
    )
    losses = kinds[rng.integers(len(kinds))]() * 10.0 ** rng.integers(-8, 9)
    return losses + 10.0 ** rng.integers(-3, 7) * rng.normal() if rng.random() < 0.3 else losses


def draw_problem(rng: np.random.Generator, exact: Exact, sizes: Sequence[int] = SIZES) -> Problem:
    """Return a random problem: radii from 1e-8 of the maximal one to beyond it, strengths over twelve decades."""
    n = int(rng.choice(sizes, p=np.array(SHARES[: len(sizes)]) / sum(SHARES[: len(sizes)])))
    losses, base = draw_losses(rng, n), None
    if rng.random() < 0.25:
        base = rng.dirichlet(np.full(n, 10.0 ** rng.uniform(-1, 1)))
        base = base / base.sum()
    if rng.random() < 0.6:
        share = Extended((losses == losses.max()).mean() if base is None else base[losses == losses.max()].sum())
        with np.errstate(all="ignore"):
            largest = float(share * exact.phi(1 / share) + (1 - share) * exact.phi(Extended(0)) if share > 0 else 1)
        largest = largest if 0 < largest < 1e100 and np.isinf(exact.cap) else 1.0
        near = 1 - 10.0 ** rng.uniform(-14, 0)
        return Problem(losses, base, True, largest * (10.0 ** rng.uniform(-8, 1) if rng.random() < 0.7 else near))
    return Problem(losses, base, False, float((np.ptp(losses) or 1.0) * 10.0 ** rng.uniform(-6, 6)))


class Verdict(NamedTuple):
    """Of an answer: by how much its value may be wrong, and what is allowed."""

    error: float
    allowed: float


def judge(problem: Problem, exact: Exact, risk: RobustRisk) -> Verdict:
    """Return how far the value can be from the truth: the truth lies between what primal and dual prove."""
    z = problem.losses.astype(Extended)
    q = np.full(len(z), 1 / Extended(len(z))) if problem.base is None else problem.base.astype(Extended)
    q = q / q.sum()
    z, q, p = z[q > 0], q[q > 0], risk.weights.numpy().astype(Extended)[q > 0]
    top, scale = z.max(), float(np.abs(problem.losses).max() + np.ptp(problem.losses))
    z, p = z - top, p / p.sum()
    mean = (q * z).sum()
    with np.errstate(all="ignore"):
        distance = (q * exact.phi(p / q)).sum()
        attained = (p * (z - mean)).sum()
        if problem.is_ball:
            attained *= min(Extended(1), problem.parameter / distance) if distance > 0 else 1
        else:
            attained -= problem.parameter * distance
        premium, threshold = Extended(risk.premium.item()), Extended(risk.threshold.item()) - top
        # Weights are rounded to eps, which total variation feels; what is summed here, to that of extended precision.
        allowed = ACCURACY * abs(float(premium)) + 64 * EPS * scale
        if np.isfinite(risk.strength.item()):
            allowed += risk.strength.item() * (EPS if exact is TOTAL_VARIATION else 16 * float(np.finfo(Extended).eps))
        bound = dual_bound(problem, exact, z, q, threshold, scale, risk.strength.item(), attained + mean + allowed)
    error = float(max(abs(premium - attained), abs(bound - mean - premium), bound - mean - attained))
    return Verdict(error, allowed)


def dual_bound(
    problem: Problem, exact: Exact, z: Any, q: Any, threshold: Any, scale: float, strength: float, enough: Any
) -> Any:
    """Return the least dual value at thresholds that round to the one returned, or one that is small enough."""
    lam = Extended(strength)
    if np.isinf(strength):
        return (q * z).sum()

    def at(nu: Any) -> Any:
        if strength == 0:
            beyond = (q * np.maximum(z - nu, 0)).sum()
            return nu + (exact.cap * beyond if beyond > 0 else 0)
        total = lam * (q * exact.conjugate((z - nu) / lam)).sum() + nu
        total = total + lam * problem.parameter if problem.is_ball else total
        return np.inf if np.isnan(total) else total

    reach = 8 * EPS * scale
    best = at(threshold)
    if best <= enough:
        return best
    low, high = threshold - reach, threshold + reach
    for _ in range(30 if len(z) <= 100 else 8):  # the dual is convex
        first, second = low + (high - low) / 3, high - (high - low) / 3
        left, right = at(first), at(second)
        best = min(best, left, right)
        low, high = (low, second) if left < right else (first, high)
    return best


@dataclass(frozen=True)
class Row:
    """What became of the problems of one divergence."""

    divergence: str
    problems: int
    gap_below_4_eps: int
    wrong: int
    refused: int
    worst_gap: float
    worst_error: float
    seconds: float

    def __add__(self, other: Row) -> Row:
        """Return what became of both."""
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("problems", "gap_below_4_eps", "wrong", "refused", "seconds")
        }
        worst_gap, worst_error = min(self.worst_gap, other.worst_gap), max(self.worst_error, other.worst_error)
        return Row(self.divergence, worst_gap=worst_gap, worst_error=worst_error, **sums)


def search(
    name: str, problems: int, seed: int, sizes: Sequence[int] = SIZES, say: Callable[[str], None] = print, part: int = 0
) -> Row:
    """Solve and judge random problems of one divergence, those of a part of them; every bad one is said."""
    rng, start = np.random.default_rng([seed, sorted(DRAWS).index(name), part]), time.perf_counter()
    negative = wrong = refused = 0
    worst_gap, worst_error = 0.0, 0.0
    for index in range(problems):
        divergence, exact = DRAWS[name](rng)
        problem = draw_problem(rng, exact, sizes)
        n, kind = len(problem.losses), "ball" if problem.is_ball else "penalty"
        what = f"{name} {part}.{index}: {divergence}, n {n}, {kind} {problem.parameter!r}"
        try:
            risk = problem.solve(divergence)
        except RuntimeError as error:
            refused += 1
            say(f"{what}: {error}")
            continue
        scale = float(np.abs(problem.losses).max() + np.ptp(problem.losses)) or 1.0
        gap, verdict = risk.gap.item() / scale, judge(problem, exact, risk)
        worst_gap = min(worst_gap, gap)
        if not gap >= -4 * EPS:
            negative += 1
            say(f"{what}: gap {gap} of the losses' scale")
        if not verdict.error <= verdict.allowed:
            wrong += 1
            say(f"{what}: error {verdict.error} where {verdict.allowed} is allowed, premium {risk.premium.item()}")
        worst_error = max(worst_error, verdict.error / verdict.allowed if verdict.allowed else 0.0)
    spent = time.perf_counter() - start
    return Row(name, problems, negative, wrong, refused, worst_gap / EPS, worst_error, spent)


def search_on(name: str, problems: int, seed: int, progress: Path) -> Row:
    """Search by slices, those aside that a file of finished ones has; append to it."""
    found = {}
    if progress.exists():
        done = [json.loads(line) for line in progress.read_text().splitlines()]
        found = {line["part"]: Row(**line["row"]) for line in done if (line["name"], line["seed"]) == (name, seed)}
    parts = range(-(-problems // SLICE))
    for part in parts:
        if part not in found:
            found[part] = search(name, SLICE, seed, part=part)
            progress.parent.mkdir(parents=True, exist_ok=True)
            with progress.open("a") as file:
                line = {"name": name, "seed": seed, "part": part, "row": asdict(found[part])}
                file.write(json.dumps(line) + "\n")
    total, *others = (found[part] for part in parts)
    for row in others:
        total += row
    return total


def main() -> None:
    """Search, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=15_000, help=f"of the library's divergences, by {SLICE}")
    parser.add_argument("--users", type=int, default=2000, help=f"problems of each user's divergence, by {SLICE}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="divergences whose name contains this")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="what is done stands here, to be resumed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in DRAWS:
        problems = options.users if name.startswith("user") else options.problems
        if options.only in name and problems > 0:
            rows.append(search_on(name, problems, options.seed, options.progress))
            print(markdown(rows[-1:]), flush=True)
    made = provenance(shlex.join(["python", "experiments/benchmarks/certificates.py", *sys.argv[1:]]))
    total = sum(row.problems for row in rows)
    held = total - sum(row.gap_below_4_eps + row.refused for row in rows)
    text = (
        f"# Certificates\n\n`{made['command']}`, {made['date']}. {made['machine']}, torch "
        f"{made['versions']['torch']}. "
        f"Random losses (n of {', '.join(map(str, SIZES))}; ties, shifts, scales, heavy tails, base weights), radii "
        "from 1e-8 of the maximal one to beyond it, strengths over twelve decades. The worst gap is in units of eps of "
        f"the losses' scale. An answer is wrong if primal and dual in extended precision leave it more room than "
        f"{ACCURACY:g} of its premium and 64 eps of that scale; the worst error is in units of that. Refused is what "
        f"raised a RuntimeError instead of an answer. The gap is at least -4 eps of the scale in {held} of {total} "
        f"problems.\n\n{markdown(rows)}\n"
    )
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
