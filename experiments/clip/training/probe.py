"""A short probe of the unsteered run: how fast a new target learns to tell pairs apart, on pairs that it has not seen.

Each batch is scored before it is trained on (prequential evaluation), so that no pair is spent on scoring alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from drrho.advice import BATCH, told_apart
from drrho.contrastive import info_nce

from ..data.batch import Batch
from ..errors import UserError
from ..models.clip import Clip
from .optimization import build_optimizer, learning_rate
from .options import Optimization

#: Share of a probe's steps, the last ones, whose scores count; and of its warm-up.
_LATE, _WARMUP = 1 / 3, 0.1
_FEWEST = BATCH - 8


class Probe(NamedTuple):
    """What a probe has seen.

    Attributes
    ----------
    seen : float
        Pairs that the target was trained on, on average over the batches that count.
    hits, scored : int
        Of so many pairs, scored before they were trained on, how many were told apart from the others of their batch.
    """

    seen: float
    hits: int
    scored: int


def run_probe(
    clip: Clip,
    batches: Iterator[Batch],
    steps: int,
    optimization: Optimization,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Train ``clip`` for some steps by InfoNCE and return how it did on the last batches before it saw them.

    ``batches`` are of about 128 pairs (`drrho.advice.BATCH`); one of fewer than 120 is trained on and not counted. The
    rate is the run's, after a warm-up over a tenth of the probe.

    Raises
    ------
    UserError
        If features become infinite or NaN, or the batches end.
    """
    options = dataclasses.replace(optimization, warmup=max(1, round(_WARMUP * steps)), schedule="constant")
    optimizer = build_optimizer(clip.model, options)
    scores: list[tuple[int, int, int]] = []
    seen = 0
    clip.model.train()
    for step in range(steps):
        batch = next(batches, None)
        if batch is None:
            raise UserError(f"the probe takes {steps} steps, and the data end after {step}: lower --epochs")
        image, text = _features(clip, batch)
        hits = told_apart(image, text)
        scores.append((seen, int(hits.sum()), len(hits)))
        try:
            loss = info_nce(image, text, 1 / clip.model.logit_scale.exp())
        except ValueError as error:  # features or temperature that are not finite
            raise UserError(f"the probe breaks off at step {step} ({error}): lower --lr") from error
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += len(batch.index)
        on_step(step + 1, steps)
    late = [each for each in scores[-max(1, round(_LATE * steps)) :] if each[2] >= _FEWEST]
    before, hits, scored = (sum(values) for values in zip(*late, strict=True)) if late else (0, 0, 0)
    return Probe(before / max(1, len(late)), hits, scored)


def _features(clip: Clip, batch: Batch) -> tuple[Tensor, Tensor]:
    image = clip.model.encode_image(clip.prepared(batch.image), normalize=True)
    return image, clip.model.encode_text(clip.prepared_tokens(batch.text), normalize=True)
