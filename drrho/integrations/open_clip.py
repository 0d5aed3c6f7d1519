"""open_clip: its contrastive loss, steered by a reference's features, also in open_clip_train's own loop.

open_clip_train gives its loss features without the samples' numbers. `steer` numbers the samples of its data loader,
and tells the loss the reference's features of each batch before the loop sees the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drrho import KL, Divergence
from drrho.contrastive import contrastive_risk, info_nce
from drrho.integrations.sample_numbers import numbered
from drrho.tiles import TensorPair

__all__ = ["Features", "SteeredClipLoss", "steer"]


class Features(Protocol):
    """A reference's features of a data set, such as the ones that `run.py cache-reference` computes once.

    Examples
    --------
    >>> import torch
    >>> class Stored:
    ...     def __init__(self, image, text):
    ...         self.image, self.text = image, text
    ...     def rows(self, index):
    ...         return self.image[index], self.text[index]
    >>> reference: Features = Stored(torch.eye(4), torch.eye(4))
    >>> reference.rows(torch.tensor([2, 0]))[0].tolist()
    [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """

    def rows(self, index: Tensor) -> TensorPair:
        """Return image and text features ``[b, d]``, of unit length, of samples ``index`` ``[b]``."""
        ...


class SteeredClipLoss(nn.Module):
    """open_clip's ``ClipLoss`` of the pair losses in excess of a reference's: ``l_ij = s_ij - s_ii - c (r_ij - r_ii)``.

    For KL it is the cross-entropy at logits ``scale (s_ij - c r_ij)``, in nats, and with ``coefficient=0`` it is
    ``ClipLoss``; for other divergences it is ``scale`` times `drrho.contrastive.contrastive_risk` at temperature
    ``1 / scale``. Memory is linear in the batch. Over ranks, pairs are compared with those of all ranks, whatever
    ``--local-loss`` and ``--gather-with-grad`` say, and the gradient is that of the whole batch, also where the loop
    accumulates (``--accum-freq``).

    Parameters
    ----------
    divergence : Divergence
        Divergence of the weights over negatives.
    coefficient : float
        Factor c of the reference's margins.
    world_size : int
        Number of ranks; above 1, those of the default process group.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.integrations.open_clip import SteeredClipLoss
    >>> image, text = normalize(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> loss = SteeredClipLoss()
    >>> loss.tell((image, image))  # a reference that takes every image for its text's
    >>> round(loss(image, text, 10.0).item(), 3)
    14.943
    """

    def __init__(self, *, divergence: Divergence | None = None, coefficient: float = 1.0, world_size: int = 1) -> None:
        super().__init__()
        self.divergence, self.coefficient, self.world_size = divergence or KL(), coefficient, world_size
        self._told: list[TensorPair] = []
        self._used = False

    def tell(self, reference: TensorPair) -> None:
        """Take the reference's features of the next batch, or of the next of several that are accumulated."""
        if self._used:
            self._told, self._used = [], False
        self._told.append(reference)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        dist_logit_scale: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of a batch of unit features ``[b, d]``; those of a reference beside it are ``dist_...``.

        Raises
        ------
        ValueError
            For a logit bias, for features of no reference, or of another number of pairs, and as
            `drrho.contrastive.contrastive_risk`: fewer than two pairs, or features that are not finite.
        """
        if logit_bias is not None:
            raise ValueError("logit_bias must be None: a softmax does not change with it (SigLIP cannot be steered)")
        beside = (
            None
            if dist_image_features is None or dist_text_features is None
            else (dist_image_features, dist_text_features)
        )
        reference = self._reference(image_features, beside)
        group = dist.group.WORLD if self.world_size > 1 else None
        shared: dict[str, Any] = {"reference": reference, "coefficient": self.coefficient, "group": group}
        # With accumulation the loop adds the gradients of as many calls, each of which has all of the scale's gradient.
        fixed = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
        logit_scale = fixed + (logit_scale - fixed) / max(1, len(self._told))
        tau = 1 / logit_scale
        if self.divergence.has_exponential_weights:
            value = info_nce(image_features, text_features, tau, **shared)
        else:
            shared |= {"divergence": self.divergence, "include_positive": True}
            risk = contrastive_risk(image_features, text_features, tau, **shared).value
            # The risk is that of all ranks, and each has its share of the gradient of the factor before it.
            value = risk * fixed + risk.detach() * (logit_scale - fixed) / self.world_size
        # Gradients are to be added over ranks, and DistributedDataParallel takes their mean.
        loss = value + (self.world_size - 1) * (value - value.detach())
        return {"contrastive_loss": loss} if output_dict else loss

    def _reference(self, own: Tensor, beside: TensorPair | None) -> TensorPair | None:
        self._used = True
        if self.coefficient == 0:
            return None
        if beside is not None:
            if self._told:
                raise ValueError("the reference is cached and beside the model: leave out --distill-model")
            return beside
        told = sum(len(image) for image, _ in self._told)
        if told != len(own):
            raise ValueError(f"the batch has {len(own)} pairs, the reference {told}: steer the loader (see steer)")
        image, text = (torch.cat(parts).to(own.device) for parts in zip(*self._told, strict=True))
        wide = torch.promote_types(image.dtype, torch.float32)
        return image.to(wide), text.to(wide)


def steer(
    loss: nn.Module,
    data: Any = None,
    reference: Features | None = None,
    *,
    index: Callable[[str, str], int] | None = None,
    divergence: Divergence | None = None,
    coefficient: float = 1.0,
) -> SteeredClipLoss:
    """Return the loss that steers open_clip_train, in place of what its ``create_loss(args)`` has made.

    Parameters
    ----------
    loss : open_clip.ClipLoss or DistillClipLoss
        It says how many ranks there are. With ``--distill-model`` that model is the reference, and needs no features.
    data : open_clip_train.data.DataInfo
        ``data["train"]``, whose loader is replaced by one that gives the same batches.
    reference : Features
        The reference's features, by the numbers of samples.
    index : callable, for webdatasets
        Maps the URL of a sample's shard, and the sample's key, to its number, as
        `experiments.clip.catalog.keys.SampleKeys` does. In a csv file or another data set that has a length, the
        number is the sample's place.
    divergence, coefficient
        As for `SteeredClipLoss`.

    Raises
    ------
    ValueError, TypeError
        For a loss that cannot be steered, no reference, features of another number of samples, or a loader that does
        not tell its samples apart.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import torch
    >>> from open_clip.loss import ClipLoss
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from drrho.integrations.open_clip import steer
    >>> data = SimpleNamespace(dataloader=DataLoader(TensorDataset(torch.eye(4), torch.eye(4)), batch_size=2))
    >>> reference = SimpleNamespace(rows=lambda index: (torch.eye(4)[index], torch.eye(4)[index]))
    >>> loss = steer(ClipLoss(), data, reference)
    >>> [round(loss(image, text, 10.0).item(), 3) for image, text in data.dataloader]
    [0.693, 0.693]
    """
    kind = type(loss).__name__
    if kind not in ("ClipLoss", "DistillClipLoss"):
        raise TypeError(f"loss must be open_clip's ClipLoss or DistillClipLoss, got {kind}, which cannot be steered")
    if loss.use_horovod:
        raise ValueError("--horovod cannot be steered: use torchrun")
    steered = SteeredClipLoss(divergence=divergence, coefficient=coefficient, world_size=int(loss.world_size))  # pyright: ignore[reportArgumentType]
    if kind == "DistillClipLoss":
        if reference is not None:
            raise ValueError("the reference is cached and beside the model: leave out --distill-model")
    elif reference is None:
        raise ValueError("reference must be the cached features of a reference, or a model named by --distill-model")
    else:
        data.dataloader = _Told(data.dataloader, reference, index, steered)
    return steered


class _Told:
    """A loader's batches without the samples' numbers, of which the loss is told the reference's features."""

    def __init__(
        self, loader: Any, reference: Features, index: Callable[[str, str], int] | None, loss: SteeredClipLoss
    ) -> None:
        self._loader, self._reference, self._loss = loader, reference, loss
        self._batches = numbered(loader, index, getattr(reference, "__len__", None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, text, index in self._batches:
            self._loss.tell(self._reference.rows(index))
            yield image, text
