"""Learned temperatures: one for every sample and direction (FastCLIP v2, iSogCLR), or one for all (FastCLIP v3, v0).

For anchor i with contrastive risk ``F_i(tau) = max_p <p, l_i> - tau KL(p || uniform)`` (`drrho.contrastive`) a learned
temperature solves ``min F_i(tau_i) + rho tau_i`` over ``tau_i`` in ``[low, high]``. Without the bounds the minimum is,
by duality, the risk of the ball, ``max <p, l_i>`` over ``KL(p || uniform) <= rho``. The slope is ``rho - KL_i``, so
that at the optimum ``KL_i`` equals rho, or is at most rho at ``low``, or at least rho at ``high``. For one temperature
shared by all anchors the same holds for the mean of the ``KL_i``.

Sources: Qiu et al. (ICML 2023), iSogCLR; Wei et al. (2024), FastCLIP, arXiv 2407.01445, v2; Kingma & Ba (2015), Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.contrastive import project_temperature
from drrho.ranks import Group
from drrho.routes import BatchIndex
from drrho.sharded import ShardedRows, fault_of_values, mean_over_repeats
from drrho.validation import ArrayLike, checks_are_deferred

__all__ = ["GlobalTemperature", "IndividualTemperatures"]

_LARGEST = torch.finfo(torch.float32).max


class GlobalTemperature:
    """Minimize ``mean_i F_i(tau) + rho tau`` over one tau in ``[low, high]`` by Adam.

    It is used like `IndividualTemperatures`, where the parameters and their units are explained; ``index`` is ignored.
    With a group, ``step`` is collective: it sums the gradients of all ranks' parts of the value.

    Examples
    --------
    >>> import torch
    >>> from drrho.contrastive import contrastive_risk
    >>> temperature = GlobalTemperature(0.1, learning_rate=0.01, low=0.05, high=1.0)
    >>> index = torch.tensor([3, 1])
    >>> tau = temperature.lookup(index)
    >>> contrastive_risk(torch.eye(2), torch.eye(2), tau, rho=0.5).value.backward()
    >>> temperature.step(index, tau)
    0
    >>> round(temperature.lookup(index).item(), 4)
    0.09
    """

    def __init__(
        self,
        initial: float,
        *,
        learning_rate: float,
        low: float,
        high: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        device: torch.device | str = "cpu",
        group: Group = None,
    ) -> None:
        self._low, start, self._high = _checked(initial, learning_rate, low, high, betas, eps)
        self._tau = torch.tensor(start, device=device, requires_grad=True)
        self._learning_rate = learning_rate
        # The fused form leaves out, on the device, a step that `found_inf` refuses.
        self._adam = torch.optim.Adam([self._tau], lr=learning_rate, betas=betas, eps=eps, fused=True)
        self._group = group

    def lookup(self, index: ArrayLike | BatchIndex) -> Tensor:
        """Return the temperature, a scalar leaf that requires a gradient, and reset its gradient."""
        self._tau.grad = None
        return self._tau

    def step(self, index: ArrayLike | BatchIndex, temperature: Tensor, rate: float | Tensor = 1.0) -> int | Tensor:
        """Take one Adam step with the temperature's gradient and project; return 1 if the projection changed it.

        ``rate`` multiplies the learning rate of this step. In a block of `drrho.validation.deferred_checks` the result
        is a tensor, and with a gradient that is not finite nothing changes.

        Raises
        ------
        ValueError
            If the gradient is missing or, summed over ranks, not finite; then the temperature does not change.
        """
        gradient = self._tau.grad
        total = torch.full_like(self._tau.detach(), math.nan) if gradient is None else gradient.detach().clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        is_wrong = ~torch.isfinite(total)
        if not checks_are_deferred() and bool(is_wrong):
            raise ValueError(
                f"temperature.grad must be filled by backward, and finite, got {gradient} (over ranks: {total}): pass "
                "what lookup returned, after backward of a loss that it went into"
            )
        self._tau.grad = total
        self._adam.param_groups[0]["lr"] = self._learning_rate * rate
        self._adam.grad_scale, self._adam.found_inf = None, is_wrong.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._adam.step()
        return project_temperature(self._tau, self._low, self._high)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``temperature`` ``[4]``, float64: tau, the moments m and v, and the number of steps."""
        state = self._adam.state.get(self._tau)
        parts = [0.0] * 3 if not state else [float(state[key]) for key in ("exp_avg", "exp_avg_sq", "step")]
        return {"temperature": torch.tensor([float(self._tau.detach()), *parts], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the temperature and its moments that `state_dict` returned.

        Raises
        ------
        ValueError
            If the state does not hold these four numbers, all finite, with tau in ``[low, high]``.
        """
        stored = state.get("temperature")
        if stored is None or stored.shape != (4,) or not bool(torch.isfinite(stored).all()):
            raise ValueError(f"state must hold temperature, four finite numbers, got {stored}")
        tau, first, second, steps = stored.tolist()
        if not self._low <= tau <= self._high:
            raise ValueError(
                f"state must hold a temperature in [{self._low}, {self._high}], got {tau}: widen the bounds"
            )
        with torch.no_grad():
            self._tau.fill_(tau)
        values = {"step": self._tau.new_tensor(steps), "exp_avg": self._tau.new_tensor(first)}
        self._adam.state[self._tau] = values | {"exp_avg_sq": self._tau.new_tensor(second)}


class IndividualTemperatures:
    """Minimize ``F_i(tau_i) + rho tau_i`` over tau_i in ``[low, high]`` by Adam, for each sample and direction.

    A visit with gradient g moves one temperature by::

        m <- beta_1 m + (1 - beta_1) g          v <- beta_2 v + (1 - beta_2) g^2
        tau <- tau - learning_rate m_hat / (sqrt(v_hat) + eps)

    where ``m_hat = m / (1 - beta_1^t)`` and ``v_hat = v / (1 - beta_2^t)``, and t counts this sample's own visits.
    Steps are computed in float64 and stored in float32. (The code published with DRRho-CLIP divides by ``v_hat + eps``,
    without the square root.)

    With a group, every rank keeps a contiguous block of ``ceil(n / ranks)`` samples (the last ranks may keep fewer),
    and all methods except ``state_dict`` are collective: every rank calls them, with its own arguments. If the
    arguments of one rank are invalid, all ranks raise a ``ValueError`` and no state changes. In a block of
    `drrho.validation.deferred_checks` a sample whose gradient is not finite keeps its temperature and moments.

    Parameters
    ----------
    samples : int
        Number of samples n over all ranks, >= 1; indices run from 0 to n - 1. A rank keeps ``28 ceil(n / ranks)``
        bytes: tau, m and v of both directions, and the number of visits.
    initial : float
        Temperature of a sample until its first visit, in ``[low, high]``; in units of similarity, as all temperatures.
    learning_rate : float
        > 0, in units of similarity: the size of the first step, and about that of later steps.
    low, high : float
        Bounds of the temperatures, 0 < low <= high, rounded to float32.
    betas : (float, float)
        Decay rates of m and v, in [0, 1).
    eps : float
        > 0, dimensionless as the gradient is (a difference of divergences).
    device : torch.device or str
        Device of this rank's temperatures; every backend of the group works with every device.
    group : torch.distributed.ProcessGroup, optional
        Ranks that share the samples, the same as for `contrastive_risk`; by default this process keeps all.

    Raises
    ------
    ValueError
        For a parameter out of range.

    Examples
    --------
    In a batch of two pairs every anchor has one negative, so KL_i is 0, which is less than rho: temperatures fall.

    >>> import torch
    >>> from drrho.contrastive import contrastive_risk
    >>> temperatures = IndividualTemperatures(4, 0.1, learning_rate=0.01, low=0.05, high=1.0)
    >>> index = torch.tensor([3, 1])
    >>> taus = temperatures.lookup(index)
    >>> contrastive_risk(torch.eye(2), torch.eye(2), taus, rho=0.5).value.backward()
    >>> temperatures.step(index, taus)
    0
    >>> image, text = temperatures.lookup(torch.arange(4))
    >>> [round(tau, 4) for tau in image.tolist()]
    [0.1, 0.09, 0.1, 0.09]
    """

    def __init__(
        self,
        samples: int,
        initial: float,
        *,
        learning_rate: float,
        low: float,
        high: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        device: torch.device | str = "cpu",
        group: Group = None,
    ) -> None:
        self._low, start, self._high = _checked(initial, learning_rate, low, high, betas, eps)
        self._learning_rate, self._betas, self._eps = learning_rate, betas, eps
        fill = (start, start, 0.0, 0.0, 0.0, 0.0, 0.0)
        self._rows = ShardedRows(samples, fill, "temperatures", "individual temperatures", device, group)

    def lookup(self, index: ArrayLike | BatchIndex) -> tuple[Tensor, Tensor]:
        """Return the temperatures of image and text anchors of the samples ``index``, ``[b]`` each, float32.

        They are leaves that require a gradient. Pass them as ``temperature`` to `contrastive_risk` and, after backward,
        to `step`.

        Parameters
        ----------
        index : tensor, array or sequence ``[b]`` of integers, or BatchIndex
            Samples of all data, in any order and possibly repeated; b >= 0 may differ from rank to rank.

        Raises
        ------
        ValueError
            If ``index`` on some rank has another shape or dtype, or an entry outside ``[0, n)``.
        """
        image, text = self._rows.lookup(index, slice(2))
        return image.requires_grad_(), text.requires_grad_()

    def step(
        self, index: ArrayLike | BatchIndex, temperatures: tuple[Tensor, Tensor], rate: float | Tensor = 1.0
    ) -> int | Tensor:
        """Take one Adam step with the gradients of looked-up temperatures, and project to ``[low, high]``.

        Gradients are those of a mean over both directions of all ranks' samples, such as
        ``contrastive_risk(...).value``; multiplied by the number of terms of the mean, each is the gradient of the
        sample's own ``F_i + rho tau_i``. Steps start from the stored temperatures, not from the values of
        ``temperatures``.

        A sample that occurs several times, on one rank or on several, counts one visit. Every occurrence takes a step
        from the stored values; tau, m and v become the means of the results, and tau is then projected. The result is
        independent of the order and the rank of the occurrences, up to rounding of a float64 sum.

        Parameters
        ----------
        index : tensor, array or sequence ``[b]`` of integers, or BatchIndex
            As in `lookup`.
        temperatures : (Tensor, Tensor), each ``[b]``
            Temperatures from `lookup` of the same index, after backward.
        rate : float or scalar tensor
            Multiplies the learning rate of this step.

        Returns
        -------
        int, or Tensor with deferred checks
            Number of temperatures that the projection changed, over all ranks.

        Raises
        ------
        ValueError
            If on some rank ``index`` is refused by `lookup`, or a gradient is missing, has another shape than
            ``index``, or is not finite in float32 together with its square.
        """
        batch = self._rows.batch(index)
        terms = 2 * sum(batch.counts)
        gradients, fault = self._gradients(temperatures, terms)
        if not fault:
            names = (f"temperatures[{side}].grad times the {terms} terms of the mean" for side in range(2))
            law = "finite in float32, and its square"
            columns = dict(zip(names, gradients, strict=True))
            fault = fault_of_values(batch, columns, law, limit=math.sqrt(_LARGEST))
        route, gradients = self._rows.collect(batch, gradients, fault)
        kept = self._rows.own.index_select(1, route.single).double()
        visits = kept[6] + 1
        occurrences = self._stepped(kept[:6, route.place], visits[route.place], gradients, rate)
        fresh = torch.cat([mean_over_repeats(occurrences, route), visits[None]]).to(self._rows.own)
        moved = project_temperature(fresh[:2], self._low, self._high)
        self._rows.store(route, fresh)
        return self._rows.sum(moved) if isinstance(moved, Tensor) else self._rows.total(moved)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's rows, with their position among all samples.

        Returns
        -------
        dict of Tensor
            ``temperatures`` ``[7, rows]``, float32: tau, m and v of image and text anchors, and visits; ``offset``, the
            sample of the first row; ``samples``, n. Not collective.
        """
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Load the rows from states of any number of ranks, bit for bit.

        Parameters
        ----------
        state : mapping, or sequence of mappings
            Results of `state_dict` on one rank or on several, in any order; of memory-mapped tensors only this rank's
            rows are read. A state without ``offset`` and ``samples`` holds all samples.

        Raises
        ------
        ValueError
            If on some rank the states do not cover the samples it keeps, overlap, belong to another number of samples,
            hold temperatures outside ``[low, high]``, or hold moments or visits that no step can produce.
        """
        self._rows.load_state_dict(state, self._fault_of_state)

    def _gradients(self, temperatures: tuple[Tensor, Tensor], terms: int) -> tuple[list[Tensor], str]:
        """Return the gradients of each temperature's own term, float32, and an error message, empty if none."""
        if len(temperatures) != 2:
            return [], f"temperatures must be the pair of lookup, got {len(temperatures)} of them"
        gradients = []
        for side, values in enumerate(temperatures):
            # torch warns when the gradient of a tensor that is not a leaf is read.
            gradient = values.grad if values.is_leaf else None
            if gradient is None:
                return [], (
                    f"temperatures[{side}].grad must be filled by backward, got None: pass what lookup returned, after "
                    "backward of a loss that it went into"
                )
            gradients.append(gradient.to(self._rows.own) * terms)
        return gradients, ""

    def _stepped(self, kept: Tensor, visits: Tensor, gradients: Tensor, rate: float | Tensor) -> Tensor:
        """Return tau, m and v ``[6, c]`` after Adam's step number ``visits`` ``[c]``, for ``gradients`` ``[2, c]``."""
        tau, m, v = kept.split(2)
        first, second = self._betas
        m = first * m + (1 - first) * gradients
        v = second * v + (1 - second) * gradients**2
        size = (v / (1 - second**visits)).sqrt() + self._eps
        return torch.cat([tau - rate * self._learning_rate * m / (1 - first**visits) / size, m, v])

    def _fault_of_state(self, columns: Tensor) -> str:
        bounds = [
            *[(f"temperatures of {side} anchors", self._low, self._high) for side in ("image", "text")],
            *[(f"first moments of {side} anchors", -_LARGEST, _LARGEST) for side in ("image", "text")],
            *[(f"second moments of {side} anchors", 0.0, _LARGEST) for side in ("image", "text")],
            ("visits", 0.0, _LARGEST),
        ]
        for values, (name, low, high) in zip(columns, bounds, strict=True):
            least, most = (float(value) for value in values.aminmax())
            if not low <= least <= most <= high:
                return (
                    f"state must hold {name} in [{low:.9g}, {high:.9g}], got [{least:.9g}, {most:.9g}]: give bounds "
                    "that hold the temperatures, or a state that was saved by training"
                )
        return ""


def _checked(
    initial: float, learning_rate: float, low: float, high: float, betas: tuple[float, float], eps: float
) -> tuple[float, float, float]:
    """Return low, initial and high rounded to float32, or raise a ``ValueError`` that names the invalid parameter.

    The bounds are rounded as the stored temperatures are; otherwise the projection would change entries at a bound.
    """
    least, start, most = torch.tensor([low, initial, high], dtype=torch.float32).tolist()
    if not 0 < least <= start <= most < math.inf:
        raise ValueError(
            f"low, initial and high must satisfy 0 < low <= initial <= high < inf in float32, got {low}, {initial} "
            f"and {high}"
        )
    for number, name in ((learning_rate, "learning_rate"), (eps, "eps")):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {number}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    return least, start, most
