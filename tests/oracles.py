"""Independent solvers of ONE row: slow, plain, and built otherwise than a fast solver would be.

The scalar duals run in mpmath with 50 digits, by bisection only; CVaR and total variation sort exact
rationals; cvxpy is given the primal problem as it is defined. Every solver takes a sequence of floats and
returns an `Answer` of floats. Conventions: chi-square phi(t) = (t - 1)^2 / 2, KL phi(t) = t log t - t + 1,
Cressie-Read phi(t) = (t^k - k t + k - 1) / (k (k - 1)), total variation phi(t) = |t - 1| / 2, capped KL that
of KL up to t = 1 / alpha; `radius` bounds the divergence itself, `alpha` is the tail fraction, `base` the
nonnegative base weights q (divided by their exact sum; None is 1/n each) of D(p || q) = sum q phi(p / q)
(Duchi & Namkoong, arXiv 1610.02581; Rockafellar & Uryasev 2000; Levy et al. 2020; Cressie & Read 1984).
"""

from fractions import Fraction
from typing import NamedTuple

import mpmath as mp
import numpy as np

DIGITS = 50


class Answer(NamedTuple):
    """Value, value minus base mean (each rounded once, at the end), and the worst-case weights."""

    value: float
    premium: float
    weights: np.ndarray


# --- the divergences, in mpmath -----------------------------------------------------------------------------


def kl_phi(t):
    return (t * mp.log(t) if t > 0 else mp.mpf(0)) - t + 1 if t >= 0 else mp.inf


def chi_square_phi(t):
    return (t - 1) ** 2 / 2 if t >= 0 else mp.inf


def total_variation_phi(t):
    return abs(t - 1) / 2 if t >= 0 else mp.inf


def chi_square_conjugate(s):
    return (max(1 + s, 0) ** 2 - 1) / 2


def power_phi(order):
    """Cressie-Read phi of any real order, with its limits at 0 and 1."""
    k = mp.mpf(order)
    if k == 1:
        return kl_phi

    def phi(t):
        if t < 0 or (t == 0 and k <= 0):
            return mp.inf
        if k == 0:
            return t - 1 - mp.log(t)
        return (t**k - k * t + k - 1) / (k * (k - 1))

    return phi


def power_conjugate(order):
    """Cressie-Read phi*, infinite outside its domain."""
    k = mp.mpf(order)
    if k == 1:
        return mp.expm1

    def conjugate(s):
        base = 1 + (k - 1) * s
        if k > 1:
            return (max(base, 0) ** (k / (k - 1)) - 1) / k
        if base < 0 or (base == 0 and k >= 0):
            return mp.inf
        return -mp.log(base) if k == 0 else (base ** (k / (k - 1)) - 1) / k

    return conjugate


def capped_kl_phi(alpha):
    return lambda t: kl_phi(t) if t <= 1 / mp.mpf(alpha) else mp.inf


def capped_kl_conjugate(alpha):
    cap = 1 / mp.mpf(alpha)
    return lambda s: mp.expm1(s) if s <= mp.log(cap) else cap * s - kl_phi(cap)


PHI = {"kl": kl_phi, "chi2": chi_square_phi, "tv": total_variation_phi}
CONJUGATE = {"kl": mp.expm1, "chi2": chi_square_conjugate}


# --- one row ------------------------------------------------------------------------------------------------


def _base(n, base):
    """Exact base weights that sum to one."""
    if base is None:
        return [mp.mpf(1) / n] * n
    q = [mp.mpf(float(weight)) for weight in base]
    total = mp.fsum(q)
    return [weight / total for weight in q]


def _gaps(losses, q):
    """Distances below the maximum over the support (0 off it), and the base weight exactly at the maximum."""
    top = max(z for z, weight in zip(losses, q, strict=True) if weight > 0)
    gaps = [mp.mpf(top) - mp.mpf(z) if weight > 0 else mp.mpf(0) for z, weight in zip(losses, q, strict=True)]
    return gaps, mp.fsum(weight for gap, weight in zip(gaps, q, strict=True) if gap == 0)


def _dot(first, second):
    return mp.fsum(a * b for a, b in zip(first, second, strict=True))


def _answer(losses, weights, q, penalty=0):
    mean = _dot(q, map(mp.mpf, losses))
    premium = mp.fsum(p * (mp.mpf(z) - mean) for p, z in zip(weights, losses, strict=True)) - penalty
    return Answer(float(mean + premium), float(premium), np.array([float(p) for p in weights]))


def _mean(losses, q):
    return Answer(float(_dot(q, map(mp.mpf, losses))), 0.0, np.array([float(weight) for weight in q]))


def _maximum(losses, q):
    gaps, share = _gaps(losses, q)
    return _answer(losses, [weight / share if gap == 0 else mp.mpf(0) for gap, weight in zip(gaps, q, strict=True)], q)


def _normalized(raw):
    total = mp.fsum(raw)
    return [w / total for w in raw]


def _root(increasing, start):
    """The x > 0 where an increasing function changes sign: doubling, then bisection on log x to 22 digits."""
    low = high = mp.mpf(start)
    while increasing(low) > 0:
        low /= 16
    while increasing(high) < 0:
        high *= 16
    while high - low > mp.mpf(10) ** -22 * high:
        middle = mp.sqrt(low * high)
        if increasing(middle) > 0:
            high = middle
        else:
            low = middle
    return mp.sqrt(low * high)


def _divergence(phi, weights, q):
    return mp.fsum(b * phi(p / b) for p, b in zip(weights, q, strict=True) if b > 0)


def divergence(phi, weights, base=None):
    """D(p || q) of given float weights in high precision; `phi` is a name in PHI or an mpmath function."""
    with mp.workdps(DIGITS):
        weights = [mp.mpf(float(p)) for p in weights]
        return float(_divergence(PHI.get(phi, phi), weights, _base(len(weights), base)))


def maximal_radius(phi, losses, base=None):
    """The smallest radius at which the risk is the maximum loss: D of the base weights restricted to the ties."""
    with mp.workdps(DIGITS):
        _, share = _gaps(losses, _base(len(losses), base))
        off = (1 - share) * phi(mp.mpf(0)) if share < 1 else 0
        return float(share * phi(1 / share) + off)


def dual(conjugate, losses, strength, threshold, radius=0.0, base=None):
    """The dual objective strength * mean phi*((z - threshold) / strength) + threshold + strength * radius."""
    with mp.workdps(DIGITS):
        return float(_dual(CONJUGATE.get(conjugate, conjugate), losses, strength, threshold, radius, base))


def _dual(conjugate, losses, strength, threshold, radius, base):
    lam, nu, q = mp.mpf(strength), mp.mpf(threshold), _base(len(losses), base)
    terms = [b * conjugate((mp.mpf(z) - nu) / lam) for z, b in zip(losses, q, strict=True) if b > 0]
    return lam * mp.fsum(terms) + nu + lam * mp.mpf(radius)


class Certificate(NamedTuple):
    """Premium of the normalized weights, their divergence, and the dual bound on the premium."""

    primal: float
    divergence: float
    bound: float


def certify(phi, conjugate, losses, weights, strength, threshold, radius=None, base=None, cap=mp.inf):
    """Evaluate what proves a solution optimal, in high precision and without solving anything.

    By weak duality the premium of the ball (or, with `radius` None, of the penalty) lies below `bound`, whatever
    the multipliers. `cap` is the end of phi's domain: at strength 0 the dual is threshold + cap mean (z - threshold)_+.
    A threshold is known to the rounding of a loss only; the bound is the least found within that distance of it.
    """
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        mean = _dot(q, map(mp.mpf, losses))
        p = _normalized([mp.mpf(float(weight)) for weight in weights])
        reached = _divergence(phi, p, q)
        primal = mp.fsum(weight * (mp.mpf(z) - mean) for weight, z in zip(p, losses, strict=True))
        if strength > 0:
            bound = _bound(conjugate, losses, strength, threshold, radius or 0.0, base)
        else:
            excess = [b * max(mp.mpf(z) - mp.mpf(threshold), 0) for z, b in zip(losses, q, strict=True)]
            bound = threshold + (cap * mp.fsum(excess) if any(excess) else 0)
        if radius is None:
            primal -= mp.mpf(strength) * reached if strength > 0 else 0
        return Certificate(float(primal), float(reached), float(bound - mean))


def _bound(conjugate, losses, strength, threshold, radius, base):
    nu, step = mp.mpf(threshold), 4 * mp.mpf(2) ** -52 * max(abs(z) for z in [*losses, threshold])

    def at(shift):
        return _dual(conjugate, losses, strength, nu + shift, radius, base)

    here = at(0)
    if max(abs(z) for z in losses) < 100 * (max(losses) - min(losses)):
        return here
    left, right = at(-step), at(step)
    if mp.isinf(here) or mp.isinf(left):
        return min(here, right)
    bend = left + right - 2 * here
    best = min(max(step * (left - right) / (2 * bend), -step), step) if bend > 0 else mp.mpf(0)
    return min(here, left, right, at(best))


# --- balls --------------------------------------------------------------------------------------------------


def kl_ball(losses, radius, base=None):
    """max <p, z> over KL(p || q) <= radius: bisection on the inverse temperature of the softmax."""
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        (gaps, share), target = _gaps(losses, q), mp.mpf(radius)
        if target <= 0 or max(gaps) == 0:
            return _mean(losses, q)
        if target >= -mp.log(share):
            return _maximum(losses, q)

        def tilt(inverse_temperature):
            raw = [b * mp.exp(-inverse_temperature * gap) for b, gap in zip(q, gaps, strict=True)]
            total = mp.fsum(raw)
            return [w / total for w in raw], total

        def excess(inverse_temperature):
            weights, total = tilt(inverse_temperature)
            return -mp.log(total) - inverse_temperature * _dot(weights, gaps) - target

        return _answer(losses, tilt(_root(excess, mp.sqrt(8 * target) / max(gaps)))[0], q)


def chi_square_ball(losses, radius, base=None):
    """max <p, z> in the chi-square ball: bisection on mean (z - eta)_+^2 / (mean (z - eta)_+)^2 = 1 + 2 r."""
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        (gaps, share), target = _gaps(losses, q), 1 + 2 * mp.mpf(radius)
        if radius <= 0 or max(gaps) == 0:
            return _mean(losses, q)
        if target * share >= 1:
            return _maximum(losses, q)

        def positive_parts(depth):
            return [max(depth - gap, mp.mpf(0)) for gap in gaps]

        def excess(inverse_depth):
            parts = positive_parts(1 / inverse_depth)
            return _dot(q, [x * x for x in parts]) / _dot(q, parts) ** 2 - target

        parts = positive_parts(1 / _root(excess, 1 / max(gaps)))
        return _answer(losses, _normalized([b * x for b, x in zip(q, parts, strict=True)]), q)


def power_ball(losses, radius, order, base=None):
    """max <p, z> in the Cressie-Read ball: bisection on the distance of eta from the maximum.

    The weights are q (z - eta)_+^(1/(k-1)) for k > 1 and q (eta - z)^(-1/(1-k)) for k < 1, normalized.
    """
    if order == 1:
        return kl_ball(losses, radius, base)
    with mp.workdps(DIGITS):
        q, k = _base(len(losses), base), mp.mpf(order)
        (gaps, share), target = _gaps(losses, q), mp.mpf(radius)
        if target <= 0 or max(gaps) == 0:
            return _mean(losses, q)
        if k > 0 and (share ** (1 - k) - 1) / (k * (k - 1)) <= target:
            return _maximum(losses, q)

        def path(distance):
            bases = [max(distance - gap, mp.mpf(0)) if k > 1 else distance + gap for gap in gaps]
            raw = [x ** (1 / (k - 1)) if x > 0 else mp.mpf(0) for x in bases]
            return bases, raw, _dot(q, raw)

        def excess(inverse_distance):
            bases, raw, total = path(1 / inverse_distance)
            if k == 0:
                return mp.log(total) + _dot(q, map(mp.log, bases)) - target
            moment = _dot(q, [x * w for x, w in zip(bases, raw, strict=True)]) / total**k  # raw^k = raw * base
            return (moment - 1) / (k * (k - 1)) - target

        _, raw, total = path(1 / _root(excess, 1 / max(gaps)))
        return _answer(losses, [b * w / total for b, w in zip(q, raw, strict=True)], q)


def capped_kl_ball(losses, radius, alpha, base=None):
    """max <p, z> over KL(p || q) <= radius and p <= q / alpha: bisection on the inverse temperature."""
    with mp.workdps(DIGITS):
        q, target = _base(len(losses), base), mp.mpf(radius)
        gaps, _ = _gaps(losses, q)
        if target <= 0 or max(gaps) == 0 or alpha == 1:
            return _mean(losses, q)
        tail = _tail(gaps, q, alpha)
        if _divergence(kl_phi, tail, q) <= target:
            return _answer(losses, tail, q)

        def excess(inverse_temperature):
            return _divergence(kl_phi, _capped_tilt(gaps, q, alpha, inverse_temperature), q) - target

        root = _root(excess, mp.sqrt(8 * target) / max(gaps))
        return _answer(losses, _capped_tilt(gaps, q, alpha, root), q)


def _tail(gaps, q, alpha):
    """Weights of CVaR: q / alpha from the top down, ties at the end of the tail sharing what is left."""
    weights, budget = [mp.mpf(0)] * len(q), mp.mpf(alpha)
    for level in sorted(set(gaps)):
        tied = [i for i, gap in enumerate(gaps) if gap == level and q[i] > 0]
        mass = mp.fsum(q[i] for i in tied)
        taken = min(mass, budget)
        for i in tied:
            weights[i] = taken * q[i] / (mass * mp.mpf(alpha))
        budget -= taken
    return weights


def _capped_tilt(gaps, q, alpha, inverse_temperature):
    """q min(1 / alpha, c exp(-gap * inverse_temperature)) with the c of total mass one, exactly: by sorting."""
    cap = 1 / mp.mpf(alpha)
    raw = [mp.exp(-inverse_temperature * gap) for gap in gaps]
    order = sorted(range(len(q)), key=lambda i: gaps[i])
    rest = [mp.mpf(0)]  # mass of the raw weights from a position to the end, summed from the small ones up
    for i in reversed(order):
        rest.append(rest[-1] + q[i] * raw[i])
    factor, capped = mp.mpf(0), mp.mpf(0)
    for i, remaining in zip(order, reversed(rest[1:]), strict=True):
        factor = max(1 - cap * capped, mp.mpf(0)) / remaining if remaining > 0 else mp.inf
        if factor * raw[i] <= cap:
            break
        capped += q[i]
    return [b * min(cap, factor * w) for b, w in zip(q, raw, strict=True)]


def _exact_base(n, base):
    if base is None:
        return [Fraction(1, n)] * n
    q = [Fraction(float(weight)) for weight in base]
    return [weight / sum(q) for weight in q]


def _exact_answer(exact, weights, q, penalty=Fraction(0)):
    mean = sum(b * z for b, z in zip(q, exact, strict=True))
    premium = sum(p * (z - mean) for p, z in zip(weights, exact, strict=True)) - penalty
    return Answer(float(mean + premium), float(premium), np.array([float(p) for p in weights]))


def cvar(losses, alpha, base=None):
    """Mean of the largest losses of mass alpha, the boundary sample in part, by sorting exact rationals."""
    exact = [Fraction(float(z)) for z in losses]
    q, budget = _exact_base(len(exact), base), Fraction(alpha)
    weights = [Fraction(0)] * len(exact)
    for level in sorted({z for z, b in zip(exact, q, strict=True) if b > 0}, reverse=True):
        tied = [i for i, z in enumerate(exact) if z == level]
        mass = sum(q[i] for i in tied)
        taken = min(mass, budget)
        for i in tied:
            weights[i] = taken * q[i] / (mass * Fraction(alpha))
        budget -= taken
    return _exact_answer(exact, weights, q)


def total_variation_ball(losses, radius, base=None):
    """max <p, z> over sum |p - q| / 2 <= radius: the lowest mass `radius` moves to the maximum, exactly."""
    exact = [Fraction(float(z)) for z in losses]
    q, budget = _exact_base(len(exact), base), Fraction(radius)
    return _exact_answer(exact, _lift(exact, q, lambda z, mass, moved: min(mass, budget - moved)), q)


def total_variation_penalty(losses, strength, base=None):
    """max <p, z> - strength * TV = mean max(z, max z - strength): what lies lower moves to the maximum, exactly."""
    exact = [Fraction(float(z)) for z in losses]
    q, lam = _exact_base(len(exact), base), Fraction(strength)
    top = max(z for z, b in zip(exact, q, strict=True) if b > 0)
    weights = _lift(exact, q, lambda z, mass, moved: mass if top - z > lam else Fraction(0))
    return _exact_answer(exact, weights, q, lam * sum(abs(p - b) for p, b in zip(weights, q, strict=True)) / 2)


def _lift(exact, q, leaving):
    """Base weights after `leaving(level, mass, moved so far)` of each level's mass went to the ties at the maximum."""
    weights, moved = list(q), Fraction(0)
    *lower, top = sorted({z for z, b in zip(exact, q, strict=True) if b > 0})
    for level in lower:
        mass = sum(b for z, b in zip(exact, q, strict=True) if z == level)
        left = leaving(level, mass, moved)
        weights = [w * (mass - left) / mass if z == level else w for w, z in zip(weights, exact, strict=True)]
        moved += left
    ties = sum(b for z, b in zip(exact, q, strict=True) if z == top)
    return [w + moved * b / ties if z == top else w for w, b, z in zip(weights, q, exact, strict=True)]


# --- penalties ----------------------------------------------------------------------------------------------


def kl_penalty(losses, strength, base=None):
    """max <p, z> - strength * KL(p || q) = strength * log mean exp(z / strength)."""
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        if strength == 0:
            return _maximum(losses, q)
        gaps, _ = _gaps(losses, q)
        lam = mp.mpf(strength)
        raw = [b * mp.exp(-gap / lam) for b, gap in zip(q, gaps, strict=True)]
        total = mp.fsum(raw)
        weights = [w / total for w in raw]
        kl = -mp.log(total) - _dot(weights, gaps) / lam
        return _answer(losses, weights, q, lam * kl)


def chi_square_penalty(losses, strength, base=None):
    """max <p, z> - strength * chi2(p || q): bisection on eta until mean (z - eta)_+ = strength."""
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        if strength == 0:
            return _maximum(losses, q)
        gaps, _ = _gaps(losses, q)
        lam = mp.mpf(strength)

        def ratios_at(depth):
            return [max(depth - gap, mp.mpf(0)) / lam for gap in gaps]

        ratios = ratios_at(_root(lambda depth: _dot(q, ratios_at(depth)) - 1, lam))
        chi2 = _dot(q, [(t - 1) ** 2 for t in ratios]) / 2
        return _answer(losses, [b * t for b, t in zip(q, ratios, strict=True)], q, lam * chi2)


def power_penalty(losses, strength, order, base=None):
    """max <p, z> - strength * D_k(p || q): bisection on x until mean (x - (k - 1) gap / strength)_+^(1/(k-1)) = 1."""
    if order == 1:
        return kl_penalty(losses, strength, base)
    with mp.workdps(DIGITS):
        q, k = _base(len(losses), base), mp.mpf(order)
        if strength == 0:
            return _maximum(losses, q)
        gaps, _ = _gaps(losses, q)
        lam = mp.mpf(strength)
        steps = [(k - 1) * gap / lam for gap in gaps]

        def ratios_at(x):
            return [max(x - step, mp.mpf(0)) ** (1 / (k - 1)) if x > step else mp.mpf(0) for step in steps]

        def excess(x):
            return _dot(q, ratios_at(x)) - 1 if k > 1 else 1 - _dot(q, ratios_at(x))

        ratios = ratios_at(_root(excess, 1))
        weights = _normalized([b * t for b, t in zip(q, ratios, strict=True)])
        return _answer(losses, weights, q, lam * _divergence(power_phi(order), weights, q))


def capped_kl_penalty(losses, strength, alpha, base=None):
    """max <p, z> - strength * KL(p || q) over p <= q / alpha: a softmax cut off at the cap, by sorting."""
    with mp.workdps(DIGITS):
        q = _base(len(losses), base)
        gaps, _ = _gaps(losses, q)
        if alpha == 1:
            return _mean(losses, q)
        if strength == 0:
            return _answer(losses, _tail(gaps, q, alpha), q)
        lam = mp.mpf(strength)
        weights = _capped_tilt(gaps, q, alpha, 1 / lam)
        return _answer(losses, weights, q, lam * _divergence(kl_phi, weights, q))


def bernoulli_kl_root(mean, radius):
    """The x >= mean with x log(x / mean) + (1 - x) log((1 - x) / (1 - mean)) = radius, or 1."""
    with mp.workdps(DIGITS):
        a, target = mp.mpf(mean), mp.mpf(radius)
        if target >= -mp.log(a):
            return 1.0
        low, high = a, mp.mpf(1)
        for _ in range(200):
            x = (low + high) / 2
            kl = x * mp.log(x / a) + (1 - x) * mp.log((1 - x) / (1 - a))
            low, high = (x, high) if kl < target else (low, x)
        return float(low)


def conic(name, losses, *, radius=None, strength=None, alpha=None, base=None):
    """The primal problem as defined, handed to cvxpy: accurate to about 1e-6 of the range.

    `name` is "kl", "chi2", "tv" or the order of a Cressie-Read divergence; `alpha` caps p at base / alpha.
    """
    import cvxpy as cp

    z = np.asarray(losses, dtype=float)
    n = len(z)
    p = cp.Variable(n, nonneg=True)
    q = np.full(n, 1 / n) if base is None else np.asarray(base, dtype=float)
    divergences = {
        "cvar": lambda: 0.0,
        "kl": lambda: cp.sum(cp.kl_div(p, q)),
        "chi2": lambda: cp.sum(cp.multiply(1 / (2 * q), cp.square(p - q))),
        "tv": lambda: cp.norm1(p - q) / 2,
        0: lambda: cp.sum(cp.multiply(-q, cp.log(cp.multiply(1 / q, p)))),
    }
    constraints, objective = [cp.sum(p) == 1], p @ z
    if alpha is not None:
        constraints.append(p <= q / alpha)
    if name in divergences:
        reached = divergences[name]()
    else:
        moment = cp.sum(cp.multiply(q ** (1 - name), cp.power(p, name, approx=False)))
        reached = (moment - 1) / (name * (name - 1))
    if radius is not None:
        constraints.append(reached <= radius)
    elif strength is not None:
        objective = objective - strength * reached
    problem = cp.Problem(cp.Maximize(objective), constraints)
    problem.solve(solver=cp.CLARABEL)
    return Answer(float(problem.value), float(problem.value - q @ z), np.asarray(p.value))
