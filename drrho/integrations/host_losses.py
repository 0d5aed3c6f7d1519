"""Losses of what models of transformers return, and configurations of its trainers in which they would be wrong."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from drrho.integrations.content import IGNORED
from drrho.integrations.reference_losses import ReferenceLosses

Level = Literal["token", "sequence", "sample"]


def losses_of_outputs(outputs: Any, labels: Tensor, level: Level) -> Tensor:
    """Return the cross-entropy of next tokens ``[b, t - 1]``, 0 where ignored, or of samples ``[b]``, in >= 32 bits.

    Raises
    ------
    ValueError
        If logits and labels do not belong to a causal language model or, for samples, to a classifier.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    wanted = (*labels.shape, logits.shape[-1])
    if labels.is_floating_point() or labels.ndim != (1 if level == "sample" else 2) or logits.shape != wanted:
        raise ValueError(
            f"level={level!r} needs one label for each row of logits, got logits {list(logits.shape)} and labels "
            f"{list(labels.shape)} of {labels.dtype}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if level == "sample":
        return cross_entropy(logits, labels, reduction="none")
    labels = pad(labels[:, 1:], (0, 1), value=IGNORED)  # as the hosts do: logits without the last would be a copy
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape)[:, :-1]


class Rows(NamedTuple):
    """What is weighed: losses and reference losses ``[n]``; of sequences, how many tokens each has."""

    losses: Tensor
    reference: Tensor
    tokens: Tensor | None


def rows_of(losses: Tensor, reference: Tensor, labels: Tensor, places: Tensor | None, level: Level) -> Rows:
    """Return the losses of the tokens that are predicted, of sequences (their means), or of samples.

    ``places`` are position ids ``[b, t]``: where they are 0, another sequence of a packed row begins.
    """
    if level == "sample":
        return Rows(losses, reference, None)
    asked = labels[:, 1:] != IGNORED
    if not losses.shape == reference.shape == asked.shape:
        raise ValueError(
            f"losses of model and reference must be those of the labels {list(asked.shape)} after the first of each "
            f"row, got {list(losses.shape)} and {list(reference.shape)}"
        )
    if level == "token":
        return Rows(losses[asked], reference[asked], None)
    starts = torch.zeros_like(labels) if places is None else (places == 0).long()
    starts[:, 0] = 1
    numbers = starts.flatten().cumsum(0).view(labels.shape)[:, 1:][asked]
    _, number, tokens = numbers.unique(return_inverse=True, return_counts=True)
    own, theirs = (part.new_zeros(len(tokens)).index_add(0, number, part[asked]) for part in (losses, reference))
    return Rows(own / tokens, theirs / tokens, tokens)


def about(reference: nn.Module, level: Level) -> dict[str, Any]:
    """Return what losses of a reference are about: which model, by its weights, with how many outputs."""
    digest = hashlib.sha256()
    for name, weights in reference.state_dict().items():
        some = weights.flatten()[:: max(1, weights.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {list(weights.shape)} {weights.dtype}".encode() + some.tobytes())
    return {
        "reference": digest.hexdigest(),
        "dtype": str(next(reference.parameters()).dtype),
        "losses": "samples" if level == "sample" else "tokens",
        "outputs": outputs_of(reference, level),
    }


def outputs_of(model: Any, level: Level) -> int | None:
    """Return the number of a model's classes or of its vocabulary; None for a model without ``config``."""
    if (config := getattr(model, "config", None)) is None:
        return None
    return config.num_labels if level == "sample" else config.get_text_config().vocab_size


def refuse_configuration(trainer: Any, level: Level) -> None:
    """Raise a ``ValueError`` for the first setting of a trainer with which its loss would be wrong."""
    settings, model = trainer.args, trainer.model
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if settings.label_smoothing_factor != 0:
        wrong = (
            f"label_smoothing_factor must be 0, got {settings.label_smoothing_factor}: the reference has no such losses"
        )
    elif settings.n_gpu > 1:
        wrong = f"{settings.n_gpu} devices of one process would each weigh their own part: start a process for each"
    elif settings.world_size > 1 and not settings.average_tokens_across_devices:
        wrong = "average_tokens_across_devices must be True: tokens are counted over all ranks"
    elif getattr(settings, "use_liger_kernel", False):
        wrong = "use_liger_kernel must be False: it has no losses of single tokens"
    elif getattr(settings, "loss_type", None) == "dft":
        wrong = "loss_type must be 'nll', got 'dft'"
    elif getattr(trainer, "aux_loss_enabled", False):
        wrong = "the router's auxiliary loss would be lost: set output_router_logits=False in the model's config"
    elif getattr(trainer.accelerator, "parallelism_config", None) is not None:
        wrong = "only data parallelism is supported, not that of tensors or sequences: leave parallelism_config out"
    elif trainer.compute_loss_func is not None:
        wrong = "compute_loss_func must be None: the steered loss takes its place"
    elif (level != "sample") != hasattr(model, "generate") or is_encoder_decoder:
        wrong = f"level={level!r} is for {'classifiers' if level == 'sample' else 'causal language models'}, got "
        wrong += f"{type(model).__name__}: choose level 'token' or 'sequence' for the one, 'sample' for the other"
    else:
        return
    raise ValueError(wrong)


def refuse_outputs(model: nn.Module, reference: nn.Module | ReferenceLosses, level: Level, is_padded: bool) -> None:
    """Raise a ``ValueError`` if a reference has another vocabulary or other classes than the target."""
    own = outputs_of(model, level)
    theirs = reference.about.get("outputs") if isinstance(reference, ReferenceLosses) else outputs_of(reference, level)
    if None not in (own, theirs) and own != theirs and not (is_padded and level != "sample"):
        what, remedy = "classes", "train the reference on the same labels"
        if level != "sample":
            what, remedy = "vocabulary", "if one only pads the other's vocabulary, set padded_vocabulary=True"
        raise ValueError(f"reference and target must have the same {what}, got {theirs} and {own} outputs; {remedy}")
