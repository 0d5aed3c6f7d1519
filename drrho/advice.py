"""Whether to steer, by which reference and how: the gain over the unsteered run, predicted before either is trained.

What decides is measured on the target's own training pairs, which the reference has not seen: how often the reference
does not recognize a pair at all (wrong captions, false negatives), and how well it tells the others apart beside what
the unsteered run will have learned by the end of its budget. `knowledge` measures the first two, `extrapolated_level`
predicts the third from a short probe, and an `Advisor` that was fitted to finished trainings predicts gains with
intervals. That a reference reduces the variance of the losses does not predict the gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

__all__ = [
    "Advice",
    "Advisor",
    "Finished",
    "Intervention",
    "Knowledge",
    "Prediction",
    "extrapolated_level",
    "knowledge",
    "log_odds",
    "told_apart",
    "with_least_unrecognized",
]

#: How many pairs are told apart from each other in all measures of this module.
BATCH = 128
_SAME = 1e-4  # cosines of the features of equal captions, stored in half precision, differ from 1 by less
_LEAST = 1e-4  # share that log odds are cut to, from 0 and from 1

Array = NDArray[np.float64]


def log_odds(share: float) -> float:
    """Return ``log(p / (1 - p))`` of a share p, which is cut to [0.0001, 0.9999].

    Examples
    --------
    >>> from drrho.advice import log_odds
    >>> log_odds(0.5), round(log_odds(1.0), 2)
    (0.0, 9.21)
    """
    share = min(max(share, _LEAST), 1 - _LEAST)
    return math.log(share / (1 - share))


def told_apart(image: Tensor, text: Tensor) -> Tensor:
    """Return for each pair of a batch whether its image is more similar to its own caption than to every other one.

    Captions whose features equal the own caption's do not count against it.

    Parameters
    ----------
    image, text : Tensor ``[b, d]``
        Features; what counts is their direction.

    Returns
    -------
    Tensor ``[b]`` of bool

    Examples
    --------
    >>> import torch
    >>> from drrho.advice import told_apart
    >>> told_apart(torch.eye(3), torch.eye(3)[[0, 2, 1]]).tolist()
    [True, False, False]
    """
    return _compared(image, text)[0]


@torch.no_grad()
def _compared(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the pairs of a batch.

    Returns
    -------
    Tensors ``[b]``: whether a pair is told apart, the share of other captions below its own, the share of other pairs
    whose caption equals it, and the variance of the image's similarities with captions that do not.
    """
    image, text = (normalize(each.float(), dim=1) for each in (image, text))
    similarity, equal = image @ text.T, text @ text.T > 1 - _SAME
    equal.fill_diagonal_(True)
    own, others = similarity.diagonal()[:, None], ~equal
    count = others.sum(1).clamp(min=1)
    below = ((similarity < own) & others).sum(1) / count
    best = similarity.masked_fill(equal, -math.inf).max(1).values
    mean = similarity.masked_fill(equal, 0).sum(1) / count
    variance = (similarity - mean[:, None]).masked_fill(equal, 0).square().sum(1) / count
    return best < own[:, 0], below, (equal.sum(1) - 1) / max(1, len(image) - 1), variance


class Knowledge(NamedTuple):
    """What a reference knows of training pairs, in batches of 128.

    Attributes
    ----------
    pairs : int
        Pairs that were compared.
    accuracy : float
        Share of pairs whose image is most similar to its own caption, of 128.
    unrecognized : float
        Twice the share of pairs whose own caption is in the lower half: an estimate of the share of captions that say
        nothing of their image, as those in the lower half would have as many in the upper one. In [0, 1].
    duplicates : float
        Share of negatives that have the same caption as the pair.
    spread : float
        Standard deviation of the cosines ``r_ij``, j != i, of an image i with the captions of other pairs, pooled over
        images: the unit in which temperatures of steered risks are compared. What all negatives of an anchor have in
        common, such as ``r_ii``, does not change their weights.

    Examples
    --------
    >>> from drrho.advice import Knowledge
    >>> round(Knowledge(4096, accuracy=0.57, unrecognized=0.38, duplicates=0.0, spread=0.46).level, 2)
    2.43
    """

    pairs: int
    accuracy: float
    unrecognized: float
    duplicates: float
    spread: float

    @property
    def level(self) -> float:
        """Log odds of telling apart a pair that is recognized at all."""
        return log_odds(self.accuracy / max(1 - self.unrecognized, _LEAST))


def knowledge(image: Tensor, text: Tensor, *, seed: int = 0) -> Knowledge:
    """Measure what a model knows of pairs that it has not seen, from its features alone.

    Parameters
    ----------
    image, text : Tensor ``[n, d]``
        Features of n >= 128 pairs, some thousands of them drawn at random from all; they are compared in
        batches of 128, in a random order.
    seed : int
        That of the order.

    Raises
    ------
    ValueError
        For fewer than 128 pairs, other shapes, or features that are not finite.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.advice import knowledge
    >>> text = normalize(torch.randn(512, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    >>> image = torch.cat([text[:384], -text[384:]])  # a quarter of the captions are wrong
    >>> found = knowledge(image, text)
    >>> found.accuracy, found.unrecognized
    (0.75, 0.5)
    """
    if image.ndim != 2 or image.shape != text.shape or len(image) < BATCH:
        raise ValueError(
            f"image and text must be features [n, d] of n >= {BATCH} pairs, got {list(image.shape)} and "
            f"{list(text.shape)}: give more pairs"
        )
    if not bool(torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise ValueError("image and text must be finite features, got NaN or infinite ones: check the model")
    count = len(image) // BATCH * BATCH
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(image))[:count])
    parts = [_compared(image[some], text[some]) for some in order.split(BATCH)]
    told, below, equal, variance = (torch.cat(each).double() for each in zip(*parts, strict=True))
    lower = (below < 0.5).double().mean().item()
    return Knowledge(count, told.mean().item(), min(1.0, 2 * lower), equal.mean().item(), variance.mean().sqrt().item())


def with_least_unrecognized(references: Mapping[str, Knowledge]) -> dict[str, Knowledge]:
    """Return what references know of the same pairs, with the least of their unrecognized shares for all.

    A caption that one of them recognizes is right: what others do not recognize beyond it is what they do not know.

    Examples
    --------
    >>> from drrho.advice import Knowledge, with_least_unrecognized
    >>> known = {"weak": Knowledge(4096, 0.05, 0.56, 0.0, 0.2), "strong": Knowledge(4096, 0.3, 0.4, 0.0, 0.3)}
    >>> with_least_unrecognized(known)["weak"]
    Knowledge(pairs=4096, accuracy=0.05, unrecognized=0.4, duplicates=0.0, spread=0.2)
    """
    least = min((own.unrecognized for own in references.values()), default=0.0)
    return {name: own._replace(unrecognized=least) for name, own in references.items()}


def extrapolated_level(
    hits: int, scored: int, seen: float, budget: float, curve: Sequence[tuple[float, float]]
) -> float | None:
    """Predict the level of a run at the end of its budget, from a probe and the course of other runs.

    The level is the log odds of telling a pair from 127 others. Runs of other data and sizes are taken to go through
    the same levels, faster or slower: with x0 such that the curve has the probe's level at ``log(seen) - x0``, the
    level is the curve's at ``log(budget) - x0``.

    Parameters
    ----------
    hits, scored : int
        Of so many pairs that the probe had not been trained on, how many it told apart.
    seen, budget : float
        Pairs that probe and run are trained on.
    curve : sequence of (pairs, level)
        A run's course, both ascending; it is linear in ``log(pairs)`` between points, and constant past the last.

    Returns
    -------
    float or None
        None where the probe is too short to tell: it is less than four standard errors above chance, or below the
        curve.

    Examples
    --------
    >>> from drrho.advice import extrapolated_level
    >>> curve = [(1e4, -3.0), (1e5, 1.0), (1e6, 3.0)]
    >>> extrapolated_level(12, 1024, 2e4, 1e6, curve) is None
    True
    >>> round(extrapolated_level(275, 1024, 5e4, 5e5, curve), 2)
    2.0
    """
    chance = scored / BATCH
    if not scored or hits < chance + 4 * math.sqrt(chance):
        return None
    level = log_odds(hits / scored)
    pairs, levels = np.log([x for x, _ in curve]), np.array([y for _, y in curve])
    if level < levels[0]:
        return None
    shift = math.log(seen) - float(np.interp(level, levels, pairs))
    return float(np.interp(math.log(budget) - shift, pairs, levels))


Select = Literal["all", "jest", "jest-top-k", "rho-top-k"]


class Intervention(NamedTuple):
    """What a reference is used for: to weigh negatives, to select pairs, or both.

    Attributes
    ----------
    coefficient : float
        How much of the reference's margins is subtracted; 0 without steering.
    temperature : float
        That of the steered risk, in units of similarity; 0 without steering.
    divergence : str
        "kl", "chi-square", or "" without steering.
    select : str
        How pairs are selected, or "all".
    candidates : int
        Pairs that are scored for each pair that is trained on.

    Examples
    --------
    >>> from drrho.advice import Intervention
    >>> Intervention(1.0, 0.125, "kl").cost, round(Intervention(select="jest", candidates=5).cost, 2)
    (1.0, 2.67)
    """

    coefficient: float = 0.0
    temperature: float = 0.0
    divergence: Literal["", "kl", "chi-square"] = ""
    select: Select = "all"
    candidates: int = 1

    @property
    def selects(self) -> bool:
        """Whether pairs are left out."""
        return self.select != "all"

    @property
    def cost(self) -> float:
        """Operations relative to the unsteered run's: a candidate is a forward pass, a third of a pair's training."""
        return 1 + self.candidates / 3 if self.selects else 1.0


# Temperatures at which bases are measured, in units of the reference's spread; the distance to them counts in log.
_KL_TAU, _CHI_TAU, _CANDIDATES = 0.4, 0.1, 5
_LEAD = 0.7  # difference of levels from which on more counts little
_EXPONENT = 0.6  # of the unrecognized share: the first wrong captions cost most


def predictors(how: Intervention, reference: Knowledge, level: float) -> dict[str, float]:
    """Return the predictors of the gain in log odds, by name; ``level`` is that of the unsteered run at the end.

    By how much a reference is ahead counts less and less, in either direction: its lead is the hyperbolic tangent of
    the difference of levels over 0.7. Wrong captions make a lead count for more. Temperatures count in units of the
    spread of the reference's similarities.
    """
    noise = reference.unrecognized**_EXPONENT
    if how.selects:
        fewer = math.log(min(how.candidates, _CANDIDATES) / _CANDIDATES)
        return {
            "select": 1.0,
            "jest-top-k": float(how.select == "jest-top-k"),
            "rho-top-k": float(how.select == "rho-top-k"),
            "select and steer": float(how.coefficient > 0),
            "select, unrecognized": noise,
            "select, unrecognized, candidates": noise * fewer,
        }
    lead = math.tanh((reference.level - level) / _LEAD)
    temperature = math.log(how.temperature / max(reference.spread, _LEAST))
    found = {
        "steer": 1.0,
        "unrecognized": noise,
        "lead": how.coefficient * lead,
        "unrecognized, lead": how.coefficient * lead * noise,
    }
    if how.divergence == "kl":
        apart = temperature - math.log(_KL_TAU)
        found["kl temperature"] = apart**2
        found["kl coefficient below 1"] = max(0.0, 1 - how.coefficient)
        found["kl coefficient above 1"] = max(0.0, how.coefficient - 1)
        return found
    apart = temperature - math.log(_CHI_TAU)
    return {**found, "chi-square": 1.0, "chi-square warmer": max(apart, 0.0), "chi-square colder": max(-apart, 0.0)}


class Finished(NamedTuple):
    """A finished training beside its unsteered twin.

    Attributes
    ----------
    group : str
        What is left out together when predictions are held against measurements, such as reference and captions.
    how, reference, level
        As for `Advisor.predict`.
    twin, score : float
        Shares in (0, 1) that twin and training reached in the metric.
    error : float
        Standard error of ``score - twin``.

    Examples
    --------
    >>> from drrho.advice import Finished, Intervention, Knowledge
    >>> known = Knowledge(4096, 0.93, 0.0, 0.0, 0.4)
    >>> one = Finished("strong, clean", Intervention(1.0, 0.125, "kl"), known, 0.9, twin=0.15, score=0.17, error=0.005)
    >>> round(one.gain, 2)
    2.0
    """

    group: str
    how: Intervention
    reference: Knowledge
    level: float
    twin: float
    score: float
    error: float

    @property
    def gain(self) -> float:
        """The gain in percent points."""
        return 100 * (self.score - self.twin)


class Prediction(NamedTuple):
    """A predicted gain over the unsteered run, in percent points of its metric, with an interval.

    Examples
    --------
    >>> from drrho.advice import Intervention, Prediction
    >>> str(Prediction("a", Intervention(0.5, 0.15, "kl"), 2.0, -1.0, 5.25))
    'a, c 0.5, tau 0.15, kl: +2.0 points (-1.0 to +5.2)'
    """

    reference: str
    how: Intervention
    points: float
    low: float
    high: float

    def __str__(self) -> str:
        how = self.how
        words = [self.reference]
        if how.coefficient:
            words += [f"c {how.coefficient:g}", f"tau {how.temperature:g}", how.divergence]
        if how.selects:
            words.append(f"{how.select} 1 in {how.candidates}")
        return f"{', '.join(words)}: {self.points:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class Advice:
    """Predictions for all references and interventions, the best first.

    Attributes
    ----------
    predictions : tuple of Prediction
    recommended : Prediction or None
        The largest predicted gain; None where none is above 0: do not steer.

    Examples
    --------
    >>> from drrho.advice import Advice
    >>> print(Advice(()))
    do not steer
    """

    predictions: tuple[Prediction, ...]

    @classmethod
    def ranked(cls, predictions: Iterable[Prediction]) -> Advice:
        """Return the advice by predictions in any order."""
        return cls(tuple(sorted(predictions, key=lambda each: -each.points)))

    @property
    def recommended(self) -> Prediction | None:
        """The first prediction, unless it is of no gain."""
        return next((each for each in self.predictions[:1] if each.points > 0), None)

    def __str__(self) -> str:
        best = self.recommended
        if best is None:
            return "do not steer"
        return f"{best}{', though the interval includes 0' if best.low <= 0 else ''}"


@dataclass(frozen=True)
class Advisor:
    """Predicts gains: linear in `predictors` on the scale of log odds, with conformal intervals.

    Attributes
    ----------
    weights : mapping of str to float
        Change of the log odds of the score for each predictor.
    half_widths : mapping of str to float
        Of 95 % intervals on the same scale, for "steer" and "select".
    most_unrecognized, least_level : float
        References that recognize less, or tell less apart, are not judged: nothing like them was fitted to, and one
        that knows nothing looks like data without any right caption.

    Examples
    --------
    >>> from drrho.advice import Advisor, Intervention, Knowledge
    >>> advisor = Advisor({"steer": 0.3, "unrecognized": 0.7}, {"steer": 0.5, "select": 1.0})
    >>> known = {"a": Knowledge(4096, 0.57, 0.38, 0.0, 0.46)}
    >>> print(advisor.advise(known, [Intervention(1.0, 0.125, "kl")], twin=0.03, level=-0.5))
    a, c 1, tau 0.125, kl: +2.8 points (+0.6 to +6.2)
    """

    weights: Mapping[str, float]
    half_widths: Mapping[str, float]
    most_unrecognized: float = 1.0
    least_level: float = -math.inf

    def judges(self, reference: Knowledge) -> bool:
        """Return whether a reference is like those that the advisor was fitted to, or better.

        The unrecognized share is compared less two standard errors.
        """
        half = reference.unrecognized / 2
        least = reference.unrecognized - 4 * math.sqrt(half * (1 - half) / reference.pairs)
        return least <= self.most_unrecognized and reference.level >= self.least_level

    def log_odds(self, how: Intervention, reference: Knowledge, level: float) -> float:
        """Return by how much the log odds of the score are predicted to change."""
        return sum(self.weights.get(name, 0.0) * value for name, value in predictors(how, reference, level).items())

    def predict(self, name: str, how: Intervention, reference: Knowledge, twin: float, level: float) -> Prediction:
        """Predict the gain over a run that reaches the share ``twin`` in (0, 1), at ``level``, without steering."""
        if not 0 < twin < 1:
            raise ValueError(f"twin must be a share in (0, 1), got {twin}: what the unsteered run is expected to reach")
        change, half = self.log_odds(how, reference, level), self.half_widths[_kind(how)]
        gains = (_gain(twin, each) for each in (change, change - half, change + half))
        return Prediction(name, how, *gains)

    def advise(
        self, references: Mapping[str, Knowledge], menu: Iterable[Intervention], *, twin: float, level: float
    ) -> Advice:
        """Predict the gain of each reference that is judged and each intervention, and recommend the largest.

        Parameters
        ----------
        references : mapping of str to Knowledge
        menu : iterable of Intervention
        twin : float
            Share in (0, 1) that the unsteered run is expected to reach, in the metric in which gains are counted.
        level : float
            Log odds of its telling a training pair from 127 others at the end, by `extrapolated_level`.

        Raises
        ------
        ValueError
            If twin is not a share.
        """
        menu = list(menu)
        judged = {name: own for name, own in references.items() if self.judges(own)}
        return Advice.ranked(self.predict(name, how, own, twin, level) for name, own in judged.items() for how in menu)

    @classmethod
    def fitted(cls, trainings: Sequence[Finished], *, ridge: float = 0.5, confidence: float = 0.95) -> Advisor:
        """Fit the weights by ridge regression of gains in log odds, and the intervals by residuals of left-out groups.

        A training counts by the inverse of its variance, to which 0.15^2 is added. Half-widths are conformal: the
        smallest such that the share ``confidence`` of left-out predictions, and one more, are within.

        Raises
        ------
        ValueError
            If all trainings are of one group.
        """
        groups = {each.group for each in trainings}
        if len(groups) < 2:
            raise ValueError(f"trainings must be of at least 2 groups, got {sorted(groups)}: intervals leave one out")
        apart: dict[str, list[float]] = {"steer": [], "select": []}
        for each, change in cls.left_out(trainings, lambda own: own.group, ridge=ridge):
            if math.isfinite(change):
                apart[_kind(each.how)].append(abs(change - (_raw(each.score) - _raw(each.twin))))
        halves = {kind: _quantile(values, confidence) for kind, values in apart.items()}
        unrecognized, levels = zip(
            *((each.reference.unrecognized, each.reference.level) for each in trainings), strict=True
        )
        return cls(_ridge(trainings, ridge), halves, max(unrecognized) + _MORE_UNRECOGNIZED, min(levels) - _LESS_LEVEL)

    @staticmethod
    def left_out(
        trainings: Sequence[Finished], group: Callable[[Finished], Any], *, ridge: float = 0.5
    ) -> Iterator[tuple[Finished, float]]:
        """Yield each training with the change in log odds that is predicted from those of other groups alone.

        The change is NaN where no other group has the kind of intervention, steering or selection.
        """
        for own in dict.fromkeys(map(group, trainings)):
            rest = [each for each in trainings if group(each) != own]
            advisor = Advisor(_ridge(rest, ridge), {}) if rest else Advisor({}, {})
            kinds = {_kind(each.how) for each in rest}
            for each in trainings:
                if group(each) == own:
                    known = _kind(each.how) in kinds
                    yield each, advisor.log_odds(each.how, each.reference, each.level) if known else math.nan


def _kind(how: Intervention) -> str:
    return "select" if how.selects else "steer"


def _raw(share: float) -> float:
    return math.log(share / (1 - share))


def _gain(twin: float, change: float) -> float:
    """Return the gain in points of a share whose log odds change."""
    return 100 * (1 / (1 + math.exp(-(_raw(twin) + change))) - twin)


# How far a reference may be beyond those of the fit.
_MORE_UNRECOGNIZED, _LESS_LEVEL = 0.1, 2.0
_SPREAD = 0.15  # of gains in log odds that no predictor explains


def _ridge(trainings: Sequence[Finished], penalty: float) -> dict[str, float]:
    rows = [predictors(each.how, each.reference, each.level) for each in trainings]
    names = list(dict.fromkeys(name for row in rows for name in row))
    x = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    y = np.array([_raw(each.score) - _raw(each.twin) for each in trainings])
    errors = np.array([each.error / (each.twin * (1 - each.twin)) for each in trainings])
    weight = 1 / (errors**2 + _SPREAD**2)
    solution = np.linalg.solve(x.T @ (weight[:, None] * x) + penalty * np.eye(len(names)), x.T @ (weight * y))
    return dict(zip(names, solution.tolist(), strict=True))


def _quantile(values: Sequence[float], confidence: float) -> float:
    """Return the conformal quantile of residuals; infinite where they are too few."""
    rank = math.ceil(confidence * (len(values) + 1))
    return sorted(values)[rank - 1] if rank <= len(values) else math.inf
