"""Parts of bounds: their status and printed form, classes of models, confidence levels, checked samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, SupportsFloat, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drrho.reference import excess_losses
from drrho.validation import ArrayLike, as_row

__all__ = ["Bound", "Status"]

#: The length of an interval that holds every loss, or the interval itself, (low, high).
ValueRange: TypeAlias = float | tuple[float, float] | list[float]


class Status(str, Enum):
    """How far a number can be trusted.

    Examples
    --------
    >>> from drrho.bounds import empirical_bernstein, mean_coverage
    >>> empirical_bernstein([0.0, 1.0] * 50, value_range=(0, 1)).status.value
    'guarantee'
    >>> mean_coverage(1.353).status.value
    'asymptotic'
    """

    GUARANTEE = "guarantee"  # proven for every n under the printed assumptions, computed from data alone
    PLUG_IN = "plug-in"  # a proven formula with an estimate in place of a population quantity: no guarantee
    ASYMPTOTIC = "asymptotic"  # holds in the limit of many samples
    THEORY = "theory"  # proven, but a function of population quantities that the caller supplied


@dataclass(frozen=True)
class Bound:
    """A number with the inequality it stands for.

    Attributes
    ----------
    value : float
        The bound, in units of loss (a probability where ``statement`` says so); also ``float(bound)``.
    status : Status
        Whether the bound is a guarantee.
    statement : str
        The inequality, with its numbers.
    terms : mapping of str to float
        The summands of ``value``.
    confidence : float
        Lower bound on the probability, over draws of the sample, that the statement holds.
    assumptions : tuple of str
        The assumptions that the data cannot show. Everything else was checked.
    source : str
        Reference for the proof.
    method : str
        Which of several methods gave the bound; empty where there is one.

    Examples
    --------
    >>> from drrho.bounds import empirical_bernstein
    >>> bound = empirical_bernstein([0.0, 1.0] * 50, value_range=(0, 1))
    >>> round(bound.value, 4), bound.confidence, round(sum(bound.terms.values()), 4)
    (0.6906, 0.95, 0.6906)
    """

    value: float
    status: Status
    statement: str
    terms: Mapping[str, float]
    confidence: float
    assumptions: tuple[str, ...]
    source: str
    method: str = ""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        terms = [f"  {amount:>12.6g}  {name}" for name, amount in self.terms.items()]
        method = [f"  method: {self.method}"] if self.method else []
        head = f"[{self.status.value}] {self.statement}"
        return "\n".join([head, *terms, *method, *page_end(self.assumptions, self.source)])


def right_side(terms: Mapping[str, float]) -> str:
    """Return ``a + b + c = value``, the terms by name and their sum."""
    return f"{' + '.join(terms)} = {math.fsum(terms.values()):.6g}"


def page_end(assumptions: tuple[str, ...], source: str) -> list[str]:
    """Return the closing lines of a printed statement."""
    return [*(f"  assumes: {assumption}" for assumption in assumptions), f"  source: {source}"]


def as_flag(value: object, name: str) -> bool:
    """Return a flag, which nothing else is taken for: a guarantee depends on it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


@dataclass(frozen=True)
class ModelClass:
    """The class of a union bound: N models, or pairs of them, and the distance of the class from them.

    ``reference_independent`` is None without a reference; False means that the reference was chosen from the class too.
    """

    log_models: float
    resolution: float
    reference_independent: bool | None
    words: str

    @staticmethod
    def of(
        models: int | None,
        log_models: float | None,
        resolution: float = 0.0,
        *,
        reference_independent: bool | None = None,
    ) -> ModelClass:
        """Check the arguments and describe the class in words."""
        if models is not None and log_models is not None:
            raise ValueError(f"give models or log_models, not both: got models={models} and log_models={log_models}")
        if reference_independent is not None:
            reference_independent = as_flag(reference_independent, "reference_independent")
        resolution = as_number(resolution, "resolution", "is the sup-norm distance to the cover", inclusive=True)
        if log_models is not None:
            log_models = as_number(log_models, "log_models", "is the log of the number of models", inclusive=True)
            words = f"for all N = exp({log_models:.6g}) models at once"
        else:
            count = 1 if models is None else models
            if isinstance(count, bool) or operator.index(count) < 1:
                raise ValueError(f"models must be an integer >= 1, got {models}: it counts the models of the class")
            log_models = math.log(count)
            words = f"for all N = {count} models at once" if count > 1 else "for one model fixed in advance"
        if reference_independent is False:
            if log_models < math.log(2):
                raise ValueError(
                    f"models must be >= 2 with reference_independent=False, got {'1' if models is None else models}: "
                    "count the class that both model and reference were chosen from"
                )
            words += ", as model and as reference (N^2 for N)"
        return ModelClass(log_models, resolution, reference_independent, words)

    @property
    def pairs(self) -> bool:
        """Whether the union is over pairs of model and reference."""
        return self.reference_independent is False

    @property
    def log_count(self) -> float:
        """Log of the number of events in the union: N, or N^2 for pairs."""
        return self.log_models * (2 if self.pairs else 1)

    @property
    def shift(self) -> float:
        """Sup-norm distance of (excess) losses from those of the cover."""
        return self.resolution * (2 if self.pairs else 1)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumptions about the class and the reference, in words."""
        assumed = []
        if self.reference_independent:
            assumed.append("the reference was fixed without looking at the sample")
        if self.pairs:
            assumed.append("theta and theta_ref both belong to the class; theta_ref may depend on the sample")
        if self.resolution > 0:
            assumed.append(f"the N models, members of the class, cover it to within {self.resolution:.6g} in sup norm")
        return tuple(assumed)


class Level(NamedTuple):
    """A log term, the rho that belongs to it, the probability of failure, and the requested one."""

    log_term: float
    rho: float
    delta: float
    asked: float

    @property
    def words(self) -> str:
        """The probability of success, in words."""
        words = f"with probability >= 1 - {self.delta:.6g}"
        if self.delta == self.asked:
            return words
        return f"{words} (implied by rho = {self.rho:.6g}, too small for 1 - {self.asked:.6g})"


def level(log_count: float, n: int, delta: float, rho: float | None = None) -> Level:
    """Return ``L = log(count / delta)`` and ``rho >= n L / (n - 1)``; a smaller rho lowers L and the confidence.

    Raises
    ------
    ValueError
        If delta is not in (0, 1), or rho is too small for any confidence.
    """
    log_term = log_count - math.log(as_probability(delta))
    smallest = n * log_term / (n - 1)
    if rho is None:
        return Level(log_term, smallest, delta, delta)
    rho = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True)
    if rho >= smallest:
        return Level(log_term, rho, delta, delta)
    log_term = rho * (n - 1) / n
    if log_term <= log_count:
        raise ValueError(
            f"rho must be > {n * log_count / (n - 1):.6g}, got {rho}: below it the implied confidence is not positive "
            f"(confidence 1 - {delta:.6g} needs rho >= {smallest:.6g})"
        )
    return Level(log_term, rho, math.exp(log_count - log_term), delta)


@dataclass(frozen=True)
class Sample:
    """One row of losses in float64 and its moments; ``rounding`` bounds the rounding errors of the original dtype."""

    losses: Tensor
    rounding: float
    n: int
    low: float
    high: float
    mean: float
    sd: float
    below: float
    above: float
    ties: int

    @staticmethod
    def of(losses: ArrayLike, reference_losses: ArrayLike | None = None, *, fewest: int = 2) -> Sample:
        """Check one row of losses, or of excess losses if there is a reference, and compute its moments."""
        row, rounding = as_bounded_row(losses, "losses")
        if reference_losses is not None:
            reference, more = as_bounded_row(reference_losses, "reference_losses")
            row, rounding = excess_losses(row, reference), rounding + more
        if row.numel() < fewest:
            raise ValueError(f"losses must have at least {fewest} entries, got {row.numel()}: one has no variance")
        low, high = row.min(), row.max()
        below = (row - low).mean()  # relative to the minimum, so that constant losses have a spread of exactly 0
        centered = row - low - below
        scale = centered.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        return Sample(
            losses=row,
            rounding=rounding,
            n=row.numel(),
            low=low.item(),
            high=high.item(),
            mean=(low + below).item(),
            sd=(scale * (centered / scale).square().mean().sqrt()).item(),
            below=below.item(),
            above=(high - low - below).item(),
            ties=int((row == high).sum()),
        )


def as_bounded_row(losses: ArrayLike, name: str) -> tuple[Tensor, float]:
    """Return losses ``[n]`` in float64, and a bound on the rounding errors of their original dtype.

    Raises
    ------
    ValueError
        If they are not one row of finite numbers.
    """
    given = as_row(losses, name)
    row = given.detach().to("cpu", torch.float64)
    return row, 4 * torch.finfo(given.dtype).eps * row.abs().max().item()


def compared(
    losses: ArrayLike,
    reference_losses: ArrayLike | None,
    independent: bool | None,
    models: int | None,
    log_models: float | None,
    resolution: float,
) -> tuple[Sample, ModelClass]:
    """Return the sample of excess losses and the models that a union bound counts.

    Raises
    ------
    ValueError
        If ``independent`` is missing with a reference, or given without one.
    """
    if (reference_losses is None) != (independent is None):
        raise ValueError(
            f"reference_independent must be True or False, got {independent}: say whether the reference was fixed "
            "without looking at this sample"
            if reference_losses is not None
            else f"reference_independent must be left out without reference_losses, got {independent}"
        )
    union = ModelClass.of(models, log_models, resolution, reference_independent=independent)
    return Sample.of(losses, reference_losses), union


def guarantee(
    what: str,
    terms: dict[str, float],
    at: Level,
    sample: Sample,
    length: float,
    union: ModelClass,
    source: str,
    numbers: str = "",
) -> Bound:
    """Return a bound that is computed from the sample alone, with its inequality in words."""
    return Bound(
        value=math.fsum(terms.values()),
        status=Status.GUARANTEE,
        statement=f"{what} <= {right_side(terms)} {at.words}, {union.words}; "
        f"{numbers}L = {at.log_term:.6g}, n = {sample.n}, B = {length:.6g}",
        terms=terms,
        confidence=1 - at.delta,
        assumptions=(
            "independent samples of one law",
            f"every loss of which R is the mean lies in an interval of length B = {length:.6g}, known in advance",
            *union.assumptions,
        ),
        source=source,
    )


def range_length(value_range: ValueRange, sample: Sample | None = None) -> float:
    """Return the length B of a declared range, a number or (low, high), which must contain the sample.

    Raises
    ------
    ValueError
        If the range is empty or not finite, or the sample exceeds it by more than its rounding errors.
    """
    if isinstance(value_range, tuple | list):
        if len(value_range) != 2:
            raise ValueError(f"value_range must be a length or (low, high), got {value_range}")
        low, high = map(float, value_range)
        if sample is not None and (sample.low < low - sample.rounding or sample.high > high + sample.rounding):
            raise ValueError(
                f"value_range is ({low:.6g}, {high:.6g}) but the losses go from {sample.low:.6g} to {sample.high:.6g}: "
                "it must hold all losses, those not seen too"
            )
        return as_number(high - low, "value_range", "is an interval (low, high) with low < high, of that length")
    length = as_number(value_range, "value_range", "is the length of an interval that holds all losses")
    if sample is not None and sample.high - sample.low > length + 2 * sample.rounding:
        raise ValueError(
            f"value_range is {length:.6g} but the losses go from {sample.low:.6g} to {sample.high:.6g}, a range of "
            f"{sample.high - sample.low:.6g}: it must hold all losses, those not seen too"
        )
    return length


def as_interval(value_range: ValueRange, sample: Sample) -> tuple[float, float]:
    """Return the ends of a declared interval, which must contain the sample.

    Raises
    ------
    ValueError
        If value_range is a length, is empty or not finite, or if the sample exceeds it.
    """
    if not isinstance(value_range, tuple | list):
        raise ValueError(f"value_range must be the interval (low, high) itself, got {value_range}: bets need its ends")
    range_length(value_range, sample)
    low, high = map(float, value_range)
    return low, high


def as_probability(delta: float) -> float:
    """Return a probability of failure in (0, 1); raise an error otherwise."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}: it is the probability of failure")
    return float(delta)


def as_number(value: SupportsFloat, name: str, meaning: str, *, inclusive: bool = False) -> float:
    """Return a finite number > 0, or >= 0 if ``inclusive``; raise an error that names the argument otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}: it {meaning}") from error
    if not 0 <= number < math.inf or (number == 0 and not inclusive):
        raise ValueError(f"{name} must be finite and {'>= 0' if inclusive else '> 0'}, got {value}: it {meaning}")
    return number


def as_sample_size(n: int) -> int:
    """Return n if it is an integer >= 2; raise an error otherwise."""
    if operator.index(n) < 2:
        raise ValueError(f"n must be >= 2, got {n}: it counts samples, and one has no variance")
    return n
