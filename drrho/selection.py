"""Choose samples by scores: the largest, a softmax sample, and batches whose pairs are learnable together.

- `top_k`: the k largest scores. For excess losses this is the selection of RHO-LOSS (Mindermann et al., ICML 2022), the
  support of the weights of ``constrained_risk(scores, CVaR(k / n))``.
- `sample`: k samples without replacement from the softmax of the scores.
- `pair_losses`: the loss of each pair of a contrastive batch; those of the target minus those of the reference are
  scores for `top_k`.
- `joint_selection`, `joint_selection_from_features`: JEST (Evans et al., NeurIPS 2024, arXiv 2406.17711), which draws a
  batch in chunks, each conditional on the chunks before it, by learnability: the loss of the target minus the loss of
  the reference.

All functions compare scores in float64. Over a ``group`` of ranks the samples are numbered by rank, and the ranks
together choose what one process with all samples would choose. Noise is a pure function of seed, chunk and the number
of the sample (Philox, Salmon et al. 2011), so every step needs its own seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from drrho.ranks import Group, first_row, gathered, row_counts
from drrho.tiles import ROWS, TILE
from drrho.validation import ArrayLike, as_losses, checks_are_deferred, refuse_not_finite

__all__ = ["PairFeatures", "joint_selection", "joint_selection_from_features", "pair_losses", "sample", "top_k"]


def top_k(scores: ArrayLike, k: int, *, group: Group = None) -> Tensor:
    """Return the indices of the k largest scores, int64 ``[..., k]``, largest first; ties in the order of indices.

    Parameters
    ----------
    scores : tensor, array or sequence, ``[..., n]``
        Excess losses or any other finite scores.
    k : int
        Number of samples to choose, in [1, n].
    group : torch.distributed.ProcessGroup, optional
        Ranks over which the scores are spread. Every rank must call the function with its own part ``[n_rank]``, of any
        length >= 0, and the same k; n is the sum of the lengths. A rank sends its ``min(k, n_rank)`` largest scores and
        gets its part of the choice in the same order, 0 to k indices into its own scores.

    Raises
    ------
    ValueError, TypeError
        Naming the argument and its value: k out of range, NaN or infinite scores, integer tensors, rows with a group.

    Examples
    --------
    >>> top_k([0.5, 2.0, -1.0, 2.0], 3)
    tensor([1, 3, 0])
    """
    rows, ranks = _rows(scores, k, group)
    return _largest_of_all(rows, k, ranks)[0]


def sample(scores: ArrayLike, k: int, *, seed: int, temperature: float = 1.0, group: Group = None) -> Tensor:
    """Draw k indices without replacement, each from the softmax of ``scores / temperature`` over those not yet drawn.

    The k largest of ``scores - max + temperature * noise`` with Gumbel noise have this law, in the order of the draws
    (Yellott 1977; Kool et al., ICML 2019). Nothing is exponentiated, so scores may have any size.

    Parameters
    ----------
    scores, k, group
        As for `top_k`, and so is the result. Every row has its own noise.
    seed : int
        In [0, 2^64).
    temperature : float
        In units of scores, in [0, 1e300]; in the limit 0 the result is that of `top_k`.

    Raises
    ------
    ValueError, TypeError
        As for `top_k`, and for a temperature or seed out of range.

    Examples
    --------
    >>> sample([0.0, 1000.0, 2000.0], 2, seed=0)
    tensor([2, 1])
    """
    noise = _noise(seed, temperature)
    rows, ranks = _rows(scores, k, group)
    return _largest_of_all(noise.added(rows, ranks), k, ranks)[0]


def joint_selection(learnability: ArrayLike, size: int, *, chunks: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Choose a batch ``[size]`` that is learnable together, in the order of the draws, for a sum over pairs: JEST.

    Each chunk is drawn by `sample` from the remaining candidates. Candidate c has the score
    ``a_cc + sum_j (a_cj + a_jc)`` over the j chosen in the chunks before, which is what c would add to the batch's
    learnability ``sum_ij a_ij``. The first chunk depends on the diagonal alone. Scores do not change within a chunk,
    so ``chunks=size`` conditions on every draw.

    For the sigmoid loss with logits ``t`` of the target and ``r`` of the reference, ``a_ii = softplus(-t_ii) -
    softplus(-r_ii)`` and ``a_ij = softplus(t_ij) - softplus(r_ij)`` off the diagonal. The softmax loss is not a sum
    over pairs: see `joint_selection_from_features`, which also needs less memory.

    Parameters
    ----------
    learnability : tensor, array or sequence, ``[n, n]``
        ``a_ij``, the target's loss on image i with text j minus the reference's; finite.
    size, chunks : int
        Number of pairs to choose, in [1, n], and number of chunks, in [1, size]. The sizes of chunks differ by at most
        one, the larger ones first.
    seed, temperature
        As for `sample`. The published temperature is 1; 0 takes the largest scores of each chunk.

    Raises
    ------
    ValueError, TypeError
        Naming the argument and its value: a matrix that is not square or finite, a size or number of chunks that does
        not fit, temperature or seed out of range.

    Examples
    --------
    Alone, samples 0 and 1 are the most learnable; together, 0 and 2:

    >>> learnability = [[3.0, 0.0, 2.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]
    >>> joint_selection(learnability, 2, chunks=2, seed=0, temperature=0.0)
    tensor([0, 2])
    """
    noise = _noise(seed, temperature)
    matrix = as_losses(learnability, "learnability").detach()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"learnability must have shape [n, n], got {list(matrix.shape)}: it pairs n images and texts")
    scores = matrix.diagonal().to(torch.float64, copy=True)

    def given(chosen: Tensor, places: Tensor, count: int) -> Tensor:
        pairs = matrix[:, chosen].sum(1, dtype=torch.float64) + matrix[chosen].sum(0, dtype=torch.float64)
        return scores.add_(pairs)

    return _by_chunks(scores, given, size, chunks, noise, _ranks(len(matrix), size, "size", matrix.device, None))


class PairFeatures(NamedTuple):
    """A model's features ``[n, d]`` of n pairs, row i of both being one pair.

    The logits are ``<image_i, text_j> / temperature + bias``, in float32 or wider. The softmax loss does not depend on
    the bias.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.selection import PairFeatures, pair_losses
    >>> features = normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> pairs = PairFeatures(features[0], features[1], temperature=0.1)
    >>> pair_losses(pairs).shape
    torch.Size([6])
    """

    image: Tensor
    text: Tensor
    temperature: float | Tensor
    bias: float | Tensor = 0.0

    def checked(self, name: str) -> PairFeatures:
        """Return the features detached and in float32 or wider; raise a ``ValueError`` if a field is invalid."""
        image, text = self.image.detach(), self.text.detach()
        if image.ndim != 2 or image.shape != text.shape:
            shapes = f"{list(image.shape)} and {list(text.shape)}"
            raise ValueError(f"{name}.image and {name}.text must both have shape [n, d], got {shapes}")
        is_known = not (checks_are_deferred() and isinstance(self.temperature, Tensor))
        if is_known and not (0 < self.temperature < float("inf") and abs(self.bias) < float("inf")):
            raise ValueError(
                f"{name} must have a finite temperature > 0 and a finite bias, got {self.temperature} and {self.bias}"
            )
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        return self._replace(image=image.to(dtype), text=text.to(dtype))

    def positives(self) -> Tensor:
        """Return the logits of the pairs themselves, ``[n]``."""
        return (self.image * self.text).sum(1) / self.temperature + self.bias

    def directions(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return anchors and others for both directions."""
        return (self.image, self.text), (self.text, self.image)

    def logits(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Return the logits ``[n, m]`` of anchors with others, without autocast."""
        with torch.autocast(anchors.device.type, enabled=False):
            return anchors @ others.T / self.temperature + self.bias


class _PairLoss(NamedTuple):
    """A loss of pairs: the positive's term plus ``share`` times the state of each direction.

    The state accumulates negatives: it starts at ``empty``, and ``gathered(state [n], logits [n, m])`` is the state
    after m more negatives. ``among`` says whether the positive counts among the negatives in the loss of a full batch.
    """

    positive: Callable[[Tensor], Tensor]
    gathered: Callable[[Tensor, Tensor], Tensor]
    empty: float
    share: float
    among: bool


_LOSSES = {  # logsigmoid, because F.softplus is linear from 20 on and loses digits there
    "softmax": _PairLoss(
        torch.neg, lambda state, t: torch.logaddexp(state, t.logsumexp(1).double()), -torch.inf, 0.5, True
    ),
    "sigmoid": _PairLoss(
        lambda t: -F.logsigmoid(t),
        lambda state, t: state - F.logsigmoid(-t).sum(1, dtype=torch.float64),
        0.0,
        1.0,
        False,
    ),
}


def pair_losses(pairs: PairFeatures, *, loss: str = "softmax", group: Group = None) -> Tensor:
    """Return every pair's loss in a contrastive batch of all n pairs, float64 ``[n]``, without a matrix ``[n, n]``.

    With logits t the losses are

    - "softmax": ``L_i = (log sum_j exp(t_ij - t_ii) + log sum_j exp(t_ji - t_ii)) / 2``, whose mean is CLIP's loss,
    - "sigmoid": ``L_i = softplus(-t_ii) + sum_{j != i} (softplus(t_ij) + softplus(t_ji))``, the amount by which the
      sum of all terms grows when pair i joins the others.

    `top_k` of the target's losses minus the reference's is the selection of RHO-LOSS (Mindermann et al., ICML 2022) for
    such a loss. The losses have no gradient.

    Parameters
    ----------
    pairs : PairFeatures
        The function needs memory for a few blocks ``[n, m]``, of at most 512 columns or 2^21 logits.
    loss : str
        "softmax" or "sigmoid".
    group : torch.distributed.ProcessGroup, optional
        Ranks over which the pairs are spread. Every rank must call the function with its own pairs ``[n_rank]``, of any
        number >= 0, and gets their losses. A rank gathers the features of all ranks.

    Raises
    ------
    ValueError
        Naming the argument and its value: another loss, features that do not fit together.

    Examples
    --------
    >>> pairs = PairFeatures(torch.eye(2), torch.eye(2), temperature=0.5)
    >>> pair_losses(pairs)
    tensor([0.1269, 0.1269], dtype=torch.float64)
    """
    pair_loss, model = _loss(loss), pairs.checked("pairs")
    n = len(model.image)
    counts = row_counts(n, group, model.image.device)
    place = torch.arange(n, device=model.image.device) + first_row(counts, group)
    width = max(ROWS, TILE // max(1, n))
    total = torch.zeros(n, dtype=torch.float64, device=model.image.device)
    for anchors, own in model.directions():
        state = torch.full_like(total, pair_loss.empty)
        for block, others in enumerate(gathered(own, counts, group).split(width)):
            logits = model.logits(anchors, others)
            if not pair_loss.among:
                column = place - block * width
                logits[column[:, None] == torch.arange(len(others), device=column.device)] = -torch.inf
            state = pair_loss.gathered(state, logits)
        total += pair_loss.share * state
    return total + pair_loss.positive(model.positives())


def joint_selection_from_features(
    target: PairFeatures,
    reference: PairFeatures,
    size: int,
    *,
    chunks: int,
    seed: int,
    temperature: float = 1.0,
    loss: str = "softmax",
    group: Group = None,
) -> Tensor:
    """Choose a batch ``[size]`` that is learnable together for a contrastive loss, without a matrix ``[n, n]``: JEST.

    Each chunk is drawn by `sample` from the remaining candidates. Candidate c has the score
    ``L_c(target) - L_c(reference)``, the excess of its own loss with the set S of samples chosen in earlier chunks as
    negatives. With a model's logits t,

    - "softmax": ``L_c = (log sum_{j in S} exp(t_cj - t_cc) + log sum_{j in S} exp(t_jc - t_cc)) / 2``,
    - "sigmoid": ``L_c = softplus(-t_cc) + sum_{j in S} (softplus(t_cj) + softplus(t_jc))``, as in `joint_selection`,

    and in the first chunk, where S is empty, L_c is the term of the positive alone, ``-t_cc`` or ``softplus(-t_cc)``.

    Parameters
    ----------
    target, reference : PairFeatures
        Features of the same n pairs; widths, temperatures and biases may differ.
    size, chunks, seed, temperature
        As for `joint_selection`. The function needs memory for a few blocks ``[n, size / chunks]``.
    loss : str
        "softmax" or "sigmoid".
    group : torch.distributed.ProcessGroup, optional
        Ranks over which the pairs are spread, as for `top_k`; they exchange scores and the features of chosen pairs.
        They choose what one process would choose, unless rounding of matrix products decides between two scores.

    Raises
    ------
    ValueError, TypeError
        As for `joint_selection`, and for features whose shapes differ or which give NaN or infinite scores.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.selection import PairFeatures, joint_selection_from_features
    >>> features = normalize(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> target, reference = PairFeatures(*features[:2], 0.1), PairFeatures(*features[2:], 0.1)
    >>> chosen = joint_selection_from_features(target, reference, 4, chunks=2, seed=0)
    >>> len(set(chosen.tolist()))  # four different pairs of the eight
    4
    """
    noise = _noise(seed, temperature)
    pair_loss = _loss(loss)
    models = (target.checked("target"), reference.checked("reference"))
    n = len(models[0].image)
    if len(models[1].image) != n:
        raise ValueError(f"reference must hold the {n} pairs of target, got {len(models[1].image)}")
    ranks = _ranks(n, size, "size", models[0].image.device, group)

    first, second = (pair_loss.positive(model.positives()).double() for model in models)
    alone = first - second
    states = alone.new_full((2, 2, n), pair_loss.empty)  # by model, by direction

    def given(chosen: Tensor, places: Tensor, count: int) -> Tensor:
        for model, directions in zip(models, states, strict=True):
            for (anchors, others), state in zip(model.directions(), directions, strict=True):
                negatives = _chosen_rows(others, chosen, places, count, group)
                state.copy_(pair_loss.gathered(state, model.logits(anchors, negatives)))
        return alone + pair_loss.share * (states[0] - states[1]).sum(0)

    return _by_chunks(alone, given, size, chunks, noise, ranks)


def _loss(name: str) -> _PairLoss:
    if name not in _LOSSES:
        raise ValueError(f"loss must be one of {list(_LOSSES)}, got {name!r}")
    return _LOSSES[name]


def _by_chunks(
    scores: Tensor, given: Callable[[Tensor, Tensor, int], Tensor], size: int, chunks: int, noise: _Noise, ranks: _Ranks
) -> Tensor:
    """Draw ``size`` of the candidates by ``scores`` ``[n]``, which ``given`` updates after each chunk."""
    if not isinstance(chunks, Integral) or not 1 <= chunks <= size:
        raise ValueError(f"chunks must be an integer in [1, size = {size}], got {chunks}")
    taken = torch.zeros_like(scores, dtype=torch.bool)
    batch = []
    for chunk in range(chunks):
        _refuse_not_finite(scores, "learnability", ranks)
        keys = noise.added(scores.masked_fill(taken, -torch.inf), ranks, chunk)
        count = size // chunks + (chunk < size % chunks)
        chosen, places = _largest_of_all(keys, count, ranks)
        taken[chosen] = True
        batch.append(chosen)
        if chunk < chunks - 1:
            scores = given(chosen, places, count)
    return torch.cat(batch)


class _Ranks(NamedTuple):
    """Position of a process: its samples begin at number ``start``, and the longest part has length ``longest``."""

    start: int
    longest: int
    group: Group


def _ranks(count: int, k: int, name: str, device: torch.device, group: Group) -> _Ranks:
    """Exchange the numbers of samples, and raise an error on every rank if k is out of range."""
    if not isinstance(k, Integral):
        raise TypeError(f"{name} must be an integer, got {k!r}")
    counts, rank = [count], 0
    if group is not None:
        counts, sizes = _gathered(torch.tensor([count, k], device=device), group).T.tolist()
        if len(set(sizes)) > 1:
            raise ValueError(f"{name} must be the same on every rank, got {sizes}")
        rank = dist.get_rank(group)
    if not 1 <= k <= sum(counts):
        raise ValueError(f"{name} must lie in [1, {sum(counts)}], the number of samples, got {k}")
    return _Ranks(sum(counts[:rank]), max(counts), group)


class _Noise(NamedTuple):
    seed: int
    temperature: float

    def added(self, scores: Tensor, ranks: _Ranks, stream: int = 0) -> Tensor:
        """Return ``(scores - max + temperature * noise) / 2``, halved so that no range of scores overflows."""
        if self.temperature == 0:
            return scores
        peak = scores.amax(-1, keepdim=True) if scores.numel() else scores.new_full((1,), -torch.inf)
        if ranks.group is not None:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=ranks.group)
        blocks, skipped = divmod(ranks.start, 4)  # each value of the generator's counter gives four numbers
        generator = np.random.Philox(key=np.array([self.seed, stream], np.uint64), counter=blocks)
        bits = generator.random_raw(skipped + scores.numel())[skipped:] >> 12
        gumbel = torch.from_numpy(-np.log(-np.log((bits + 0.5) * 2.0**-52)))  # the argument is never 0 or 1
        return (scores / 2 - peak / 2).add_(gumbel.to(scores.device).view_as(scores), alpha=self.temperature / 2)


def _noise(seed: int, temperature: float) -> _Noise:
    if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2^64), got {seed}")
    if not 0 <= temperature <= 1e300:
        raise ValueError(f"temperature must lie in [0, 1e300], got {temperature}: it is in units of the scores")
    return _Noise(seed, temperature)


def _rows(scores: ArrayLike, k: int, group: Group) -> tuple[Tensor, _Ranks]:
    if group is not None and isinstance(scores, Tensor) and scores.shape[-1:] == (0,):
        rows = scores  # this rank may have no samples
    else:
        rows = as_losses(scores, "scores", finite=False)
    rows = rows.detach().double()
    if group is not None and rows.ndim != 1:
        raise ValueError(f"scores must have shape [n] with a group, got {list(rows.shape)}: choose row by row")
    ranks = _ranks(rows.shape[-1], k, "k", rows.device, group)
    _refuse_not_finite(rows, "scores", ranks)
    return rows, ranks


def _refuse_not_finite(scores: Tensor, name: str, ranks: _Ranks) -> None:
    """Raise an error on every rank if scores of one rank are not finite; otherwise the others would wait for it."""
    if checks_are_deferred():
        return
    refused = torch.tensor(False)
    if ranks.group is not None:
        refused = (~torch.isfinite(scores)).any().long()
        dist.all_reduce(refused, dist.ReduceOp.MAX, group=ranks.group)
    refuse_not_finite(scores, name)  # its message has the position
    if refused:
        raise ValueError(f"{name} must be finite on every rank, got NaN or infinity on another")


def _largest(keys: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest keys ``[..., n]``, largest first; ties in the order of indices."""
    threshold = keys.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, tied = keys > threshold, keys == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))
    # Their number is known, unless there is NaN: then some of the indices are 0.
    size = k * math.prod(keys.shape[:-1])
    indices = torch.nonzero_static(chosen, size=size, fill_value=0)[:, -1].view(*keys.shape[:-1], k)
    order = keys.gather(-1, indices).sort(dim=-1, descending=True, stable=True).indices
    return indices.gather(-1, order)


def _largest_of_all(keys: Tensor, k: int, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """Choose the k largest keys of all ranks; return this rank's indices and their positions in the choice."""
    if ranks.group is None:
        return _largest(keys, k), torch.arange(k, device=keys.device)
    own = _largest(keys, min(k, len(keys))) if len(keys) else torch.empty(0, dtype=torch.int64, device=keys.device)
    width = min(k, ranks.longest)
    keys_of_all = _gathered(F.pad(keys[own], (0, width - len(own)), value=-torch.inf), ranks.group)
    chosen = _largest(keys_of_all.flatten(), k)
    places = (chosen // width == dist.get_rank(ranks.group)).nonzero()[:, 0]
    return own[chosen[places] % width], places


def _chosen_rows(rows: Tensor, chosen: Tensor, places: Tensor, k: int, group: Group) -> Tensor:
    """Return the k rows that the ranks have chosen, in the order of the choice."""
    if group is None:
        return rows[chosen]
    of_all = rows.new_zeros(k, rows.shape[1])
    of_all[places] = rows[chosen]
    dist.all_reduce(of_all, group=group)
    return of_all


def _gathered(sent: Tensor, group: Group) -> Tensor:
    """Return the tensors that the ranks send, ``[ranks, ...]``."""
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return torch.stack(received)
