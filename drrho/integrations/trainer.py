"""Steering for the ``Trainer`` of transformers and those derived from it, such as TRL's ``SFTTrainer``.

    from drrho import KL
    from drrho.integrations.trainer import steered

    trainer = steered(SFTTrainer, KL(), strength=1.0, reference=reference, cache="reference-losses")(model=model, ...)

``README.md`` beside this file says which losses are compared and how accumulation, packing and ranks enter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from drrho.divergences import Divergence
from drrho.integrations.content import NAME, Batch, Content, ReferenceCollator, Samples, Tokens, compute_by_content
from drrho.integrations.host_losses import (
    Level,
    about,
    losses_of_outputs,
    refuse_configuration,
    refuse_outputs,
    rows_of,
)
from drrho.integrations.reference_losses import ReferenceLosses
from drrho.integrations.steering import Steering, SteeringStep
from drrho.ranks import row_counts

__all__ = ["steered"]

CONTENTS: dict[str, Content] = {"token": Tokens, "sequence": Tokens, "sample": Samples}
_Host: Any = object  # the trainer's class stands behind `_Steered` in the class that `steered` makes


def steered(
    trainer: type,
    divergence: Divergence,
    *,
    reference: nn.Module | ReferenceLosses,
    cache: str | os.PathLike[str] | None = None,
    level: Level = "token",
    padded_vocabulary: bool = False,
    **risk: Any,
) -> Any:
    """Return a subclass of a trainer that minimizes the robust risk of excess losses; evaluation stays as it is.

    Parameters
    ----------
    trainer : type
        ``transformers.Trainer``, ``trl.SFTTrainer`` or a class derived from one of them.
    divergence : Divergence
        As for `drrho.integrations.Steering`.
    reference : torch.nn.Module or ReferenceLosses
        The reference: a model with the target's tokenizer, or its losses, computed earlier.
    cache : path, optional
        A folder. The model's losses of the training data are computed when training starts, or what an interrupted run
        has left to compute, and looked up from then on. Without it, the model runs beside the target.
    level : "token", "sequence" or "sample"
        What is weighed: the tokens of a language model, its sequences (mean losses, which weigh as many as their tokens
        without steering), or the samples of a classifier.
    padded_vocabulary : bool
        Whether reference and target may have different numbers of outputs, because one pads the common vocabulary.
    **risk
        ``radius``, ``strength``, ``rho``, ``coefficient`` and ``group`` as for `drrho.integrations.Steering`.

    Raises
    ------
    ValueError
        When the trainer is made, for a configuration in which the loss would be wrong; while it trains, for a sample
        without reference losses, for losses that are not finite, and for a batch with nothing to weigh.

    Examples
    --------
    >>> import torch
    >>> from transformers import Trainer
    >>> from drrho import KL
    >>> from drrho.integrations.trainer import steered
    >>> kind = steered(Trainer, KL(), strength=1.0, reference=torch.nn.Linear(2, 2))  # your pretrained model
    >>> issubclass(kind, Trainer)  # use it as you would use Trainer
    True
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
    if not isinstance(reference, nn.Module | ReferenceLosses):
        raise TypeError(f"reference must be a model or ReferenceLosses, got {reference!r}")
    if cache is not None and not isinstance(reference, nn.Module):
        raise ValueError(f"cache={cache} is for a reference that is a model: its losses are given")
    options = {"_reference": reference, "_cache": cache, "_level": level, "_padded_vocabulary": padded_vocabulary}
    return type(
        f"Steered{trainer.__name__}", (_Steered, trainer), options | {"_steering": Steering(divergence, **risk)}
    )


class _Steered(_Host):
    """What is overridden of a trainer."""

    _steering: Steering
    _reference: nn.Module | ReferenceLosses
    _cache: str | os.PathLike[str] | None
    _level: Level
    _padded_vocabulary: bool
    steering_step: SteeringStep | None = None  #: what the last training batch gave, with this rank's weights

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._references: Tensor | None = None
        self._places: Tensor | None = None
        #: TRL computes the losses of tokens in its output layer; given a function, it would compute all a second time.
        self._is_fused = any(kind.__module__ == "trl.trainer.sft_trainer" for kind in type(self).__mro__)
        if self._reference is self.model:
            raise ValueError("reference must be another model than the target, such as copy.deepcopy(model)")
        refuse_configuration(self, self._level)
        refuse_outputs(self.model, self._reference, self._level, self._padded_vocabulary)
        if not self._is_fused:
            self.compute_loss_func = self._loss_of_outputs

    def get_train_dataloader(self) -> DataLoader:
        """Return the host's loader, with the reference's losses in its batches where they are stored."""
        if self._cache is not None and isinstance(self._reference, nn.Module):
            with self.args.main_process_first(local=False, desc="the reference's losses"):
                self._reference = self._compute_cache(self._reference, self._cache)
        if not isinstance(self._reference, ReferenceLosses):
            return super().get_train_dataloader()
        plain = self.data_collator
        self.data_collator = ReferenceCollator(plain, self._reference, CONTENTS[self._level])
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """Return the steered loss of a training batch, and of others the host's own loss."""
        if not model.training:
            ours, self.compute_loss_func = self.compute_loss_func, None
            try:
                return super().compute_loss(model, inputs, *arguments, **named)
            finally:
                self.compute_loss_func = ours
        if "labels" not in inputs or "shift_labels" in inputs:
            raise ValueError(f"a training batch must have labels, and no shift_labels, got {', '.join(inputs)}")
        labels, stored = inputs["labels"], inputs.pop(NAME, None)
        self._references = self._live(inputs, labels) if stored is None else stored
        self._places = inputs.get("position_ids")
        if not self._is_fused:
            return super().compute_loss(model, inputs, *arguments, **named)
        recorded = _Recorded(model)
        found = super().compute_loss(recorded, inputs, *arguments, **named)
        loss = self._loss(-recorded.outputs.log_probs, labels, named.get("num_items_in_batch"))
        loss = loss * self.accelerator.num_processes
        return (loss, *found[1:]) if isinstance(found, tuple) else loss

    def _loss_of_outputs(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss for the host, as its ``compute_loss_func``; it multiplies by the number of processes."""
        return self._loss(losses_of_outputs(outputs, labels, self._level), labels, num_items_in_batch)

    def _loss(self, losses: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Return this micro-batch's risk times its share of the step, divided by ranks: the host logs their sum."""
        reference, self._references = self._references, None
        if items is None or reference is None:
            raise ValueError("the trainer must call compute_loss, with num_items_in_batch, for every training batch")
        counted = len(labels) if self._level == "sample" else int((labels[:, 1:] != -100).sum())
        counts = row_counts(counted, self._steering.group, labels.device)
        if 0 in counts:
            raise ValueError("all labels of a batch are -100: leave out samples of which no token is to be predicted")
        rows = rows_of(losses, reference, labels, self._places, self._level)
        base = None if rows.tokens is None else rows.tokens / sum(counts)
        step = self.steering_step = self._steering(rows.losses, rows.reference, base_weights=base)
        value = step.value * (sum(counts) / items)
        return value - value.detach() * (1 - 1 / self._steering.ranks)

    def _live(self, inputs: Batch, labels: Tensor) -> Tensor:
        """Return the reference's losses of a batch, as `losses_of_outputs`."""
        if isinstance(self._reference, ReferenceLosses):
            raise ValueError("a training batch has no reference losses: it must come from get_train_dataloader")
        named: dict[str, Any] = {} if self._level == "sample" else {"use_cache": False}
        named |= {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            outputs = self._reference.eval().to(labels.device)(**named)
            return losses_of_outputs(outputs, labels, self._level)

    def _compute_cache(self, reference: nn.Module, folder: str | os.PathLike[str]) -> ReferenceLosses:
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError("cache needs a train_dataset of known samples, got an IterableDataset: leave cache out")
        plain = super().get_train_dataloader()

        def batches() -> Iterator[Batch]:
            size = self.args.per_device_eval_batch_size
            yield from DataLoader(plain.dataset, size, collate_fn=plain.collate_fn)

        def losses_of(batch: Batch) -> Tensor:
            inputs = self._prepare_inputs(dict(batch))
            return self._live(inputs, inputs["labels" if self._level == "sample" else "input_ids"])

        return compute_by_content(folder, losses_of, batches, CONTENTS[self._level], about(reference, self._level))


class _Recorded:
    """Calls a model for a host, and keeps what it returned."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self._model(**inputs)
        return self.outputs
