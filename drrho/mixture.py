"""Several references at once: a mixture of their similarities, with given weights or with learned ones.

With weights w on the simplex the mixture's similarities are ``r_ij = sum_k w_k r^k_ij``. These are products of the
references' features side by side, reference k's times ``sqrt(w_k)``, which have unit norm again: a mixture is a
reference like any other, for every method. The worst case, the smallest margin of each pair, is not: pass a list of
references to `drrho.contrastive.contrastive_risk`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.contrastive import info_nce
from drrho.ranks import Group
from drrho.tiles import TensorPair
from drrho.validation import checks_are_deferred

__all__ = ["ReferenceMixture", "mixed_references"]


def mixed_references(references: Sequence[TensorPair], weights: Sequence[float] | Tensor | None = None) -> TensorPair:
    """Return features whose products are ``sum_k w_k r^k_ij``, the weighted mean of the references' similarities.

    Parameters
    ----------
    references : sequence of (Tensor, Tensor)
        Each reference's unit features ``[b, d_k]`` of images and texts, for the same pairs.
    weights : sequence or Tensor ``[references]``, optional
        Not negative, of sum 1; by default all equal.

    Returns
    -------
    (Tensor, Tensor)
        Unit features ``[b, sum_k d_k]``, to be passed as ``reference``.

    Raises
    ------
    ValueError
        Without a reference, if there is another number of weights, or if weights on the CPU are negative or do not add
        up to 1.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.mixture import mixed_references
    >>> one, two = normalize(torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> image, text = mixed_references([(one[0], one[1]), (two[0], two[1])], [0.25, 0.75])
    >>> torch.allclose(image @ text.T, 0.25 * one[0] @ one[1].T + 0.75 * two[0] @ two[1].T, atol=1e-6)
    True
    """
    if not references:
        raise ValueError("references must hold at least one pair of features, got none")
    count = len(references)
    given = torch.as_tensor([1 / count] * count if weights is None else weights, dtype=torch.float64)
    if given.shape != (count,):
        raise ValueError(f"weights must have one entry for each of the {count} references, got {list(given.shape)}")
    # On another device they are those of a `ReferenceMixture`, and to read them would wait for it.
    is_read = weights is not None and given.device.type == "cpu" and not checks_are_deferred()
    if is_read and not (bool((given >= 0).all()) and abs(float(given.sum()) - 1) <= 1e-5):
        raise ValueError(f"weights must not be negative and must add up to 1, got {given.tolist()}")
    roots = given.sqrt().to(references[0][0]).unbind()
    image, text = (
        torch.cat([root * each[side] for root, each in zip(roots, references, strict=True)], 1) for side in (0, 1)
    )
    return image, text


def separate_references(features: TensorPair, widths: Sequence[int]) -> list[TensorPair]:
    """Return each reference's own features, of ``widths``, from those that `mixed_references` gave without weights."""
    root = math.sqrt(len(widths))
    image, text = ([root * part for part in side.split(list(widths), 1)] for side in features)
    return list(zip(image, text, strict=True))


class ReferenceMixture:
    """Learn the weights of several references by maximum likelihood of the pairs (stacking), while a target is trained.

    With scales ``beta_k >= 0`` it minimizes InfoNCE of the stacked similarities, in both directions::

        L(beta) = -mean_i log softmax_j( sum_k beta_k r^k_ij )_i        w = beta / sum_k beta_k

    which is convex: a multinomial regression of which of the batch belongs to an anchor on what each reference says. A
    reference that tells nothing beyond the others gets weight 0. Adam moves ``log beta``, so that scales stay positive,
    by exponentiated gradients. The weights are the same on all ranks. Stacking: Wolpert (1992), Breiman (1996).

    Parameters
    ----------
    scales : sequence of float
        Each reference's own logit scale, > 0: the scales start at these divided by their number.
    learning_rate : float
        Of Adam in ``log beta``, > 0: the size of the first steps.
    group : torch.distributed.ProcessGroup, optional
        Ranks over which batches are spread; ``gradient`` is then collective.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.mixture import ReferenceMixture
    >>> generator = torch.Generator().manual_seed(0)
    >>> good, noise = normalize(torch.randn(2, 64, 16, generator=generator), dim=-1)
    >>> mixture = ReferenceMixture([10.0, 10.0], learning_rate=0.1)
    >>> for _ in range(20):
    ...     mixture.step(mixture.gradient([(good, good), (good, noise)]))
    >>> bool(mixture.weights[0] > 2 * mixture.weights[1])  # the second knows nothing of the texts
    True
    """

    def __init__(self, scales: Sequence[float], *, learning_rate: float = 0.01, group: Group = None) -> None:
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be finite and > 0, one for each reference, got {list(scales)}")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and > 0, got {learning_rate}")
        self._rate, self._group = learning_rate, group
        start = torch.tensor(scales, dtype=torch.float64).log() - math.log(len(scales))
        #: log beta, Adam's first and second moments, and the number of steps, in rows ``[4, references]``, float64.
        self._state = torch.stack([start, *torch.zeros(3, len(scales), dtype=torch.float64)])

    @property
    def weights(self) -> Tensor:
        """The weights of the mixture ``[references]``, float64."""
        return self._state[0].softmax(0)

    def gradient(self, references: Sequence[TensorPair], counts: Sequence[int] | None = None) -> Tensor:
        """Return the gradient of L on a batch with respect to ``log beta``, ``[references]``, float64.

        Parameters
        ----------
        references : sequence of (Tensor, Tensor)
            Each reference's unit features ``[b, d_k]`` of this rank's pairs.
        counts : sequence of int, optional
            The number of pairs of every rank, where the caller knows them.
        """
        device, narrow = references[0][0].device, references[0][0].dtype
        self._state = self._state.to(device)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            scales = self._state[0].detach().requires_grad_()
            factors = scales.exp().to(torch.promote_types(narrow, torch.float32)).unbind()
            image = torch.cat([factor * each[0].detach() for factor, each in zip(factors, references, strict=True)], 1)
            text = torch.cat([each[1].detach() for each in references], 1)
            value = info_nce(image, text, 1.0, group=self._group, counts=counts)
            (found,) = torch.autograd.grad(value, scales)
        if self._group is not None:
            dist.all_reduce(found, group=self._group)
        return found

    def step(self, gradient: Tensor) -> None:
        """Take a step of Adam; with a gradient that is not finite nothing changes.

        Raises
        ------
        ValueError
            If the gradient is not finite, unless checks are deferred (`drrho.validation.deferred_checks`).
        """
        is_finite = torch.isfinite(gradient).all()
        if not checks_are_deferred() and not bool(is_finite):
            raise ValueError(f"gradient must be finite, got {gradient.tolist()}")
        scales, first, second, steps = self._state
        first, second, steps = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square(), steps + 1
        moved = (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        after = torch.stack([scales - self._rate * moved, first, second, steps])
        self._state = torch.where(is_finite, after, self._state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``mixture`` ``[4, references]``: log beta, the moments and the number of steps."""
        return {"mixture": self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is of another number of references, or not finite.
        """
        stored = state.get("mixture")
        if stored is None or stored.shape != self._state.shape or not bool(torch.isfinite(stored).all()):
            shape = None if stored is None else list(stored.shape)
            raise ValueError(f"state must hold mixture, finite numbers {list(self._state.shape)}, got {shape}")
        self._state = stored.to(self._state)
