"""The part ``contrastive``: the contrastive risk beside the same in plain torch and InfoNCE, in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import drrho
from drrho.contrastive import contrastive_risk
from experiments.benchmarks.gpu.cases import Setting, unit_features
from experiments.benchmarks.gpu.clock import measured, milliseconds, or_reason, ratio, release
from experiments.benchmarks.gpu.record import Record

WIDTH = 512
TEMPERATURE = 0.05
_PROBED_ROWS = 2**30  # similarities of the product whose rate is measured
#: Matrix products of ``b x b x WIDTH``: similarities, the same again backward, and one for each gradient.
PRODUCTS = {"ours": 4, "ours, steered": 6}

_CHI_SQUARE, _CVAR = "ours, chi-square", "ours, CVaR .1"
INFO_NCE = "InfoNCE, plain torch"


class Batch(NamedTuple):
    """Features of target and reference."""

    image: Tensor
    text: Tensor
    reference: tuple[Tensor, Tensor]

    def gradient(self, value: Tensor) -> tuple[Tensor, ...]:
        """Backward."""
        return torch.autograd.grad(value, (self.image, self.text))


Form = Callable[[Batch], Tensor]


def plain_risk(batch: Batch, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the KL risk as one would write it, in the precision of the features."""
    similarity = batch.image @ batch.text.T
    if reference is not None:
        similarity = similarity - reference[0] @ reference[1].T
    similarity = similarity.float()
    positive = similarity.diagonal()[:, None]
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    total = similarity.new_zeros(())
    for matrix in (similarity, similarity.T):
        total = total + torch.logsumexp(((matrix - positive) / TEMPERATURE).masked_fill(own, -torch.inf), 1).mean()
    return TEMPERATURE * total / 2


def plain_info_nce(batch: Batch) -> Tensor:
    """Return CLIP's loss as open_clip computes it."""
    logits = batch.image @ batch.text.T / TEMPERATURE
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def _ours(**options: Any) -> Form:
    return lambda batch: contrastive_risk(batch.image, batch.text, TEMPERATURE, **options).value


def _own_temperatures(batch: Batch) -> Tensor:
    taus = torch.full((len(batch.image),), TEMPERATURE, device=batch.image.device)
    return contrastive_risk(batch.image, batch.text, (taus, taus)).value


FORMS: dict[str, Form] = {
    "ours": _ours(),
    "ours, steered": lambda batch: _ours(reference=batch.reference)(batch),
    INFO_NCE: plain_info_nce,
    "plain torch": lambda batch: plain_risk(batch, None),
    "plain torch, steered": lambda batch: plain_risk(batch, batch.reference),
    _CHI_SQUARE: _ours(divergence=drrho.ChiSquare()),
    _CVAR: _ours(divergence=drrho.CVaR(0.1)),
    "ours, a temperature per anchor": _own_temperatures,
}
_OURS, _PAIR = ("ours", "ours, steered"), ("ours", "ours, steered", INFO_NCE)
_PLAIN = (*_PAIR, "plain torch", "plain torch, steered")


class Case(NamedTuple):
    """A batch size in a precision: "float32", "TF32" or "bfloat16" (of the features)."""

    pairs: int
    precision: str
    forms: tuple[str, ...]


#: Those with figures to reach come first.
CASES = (
    Case(5120, "float32", tuple(FORMS)),
    Case(5120, "TF32", tuple(FORMS)),
    Case(32768, "TF32", _PLAIN),
    Case(131072, "TF32", _OURS),
    Case(262144, "TF32", _OURS),
    Case(1024, "float32", _PLAIN),
    Case(5120, "bfloat16", tuple(FORMS)),
    Case(32768, "bfloat16", _PLAIN),
    Case(131072, "bfloat16", _OURS),
    Case(16384, "float32", _PLAIN),
    Case(32768, "float32", _PLAIN),
    Case(131072, "float32", ("ours",)),
    Case(262144, "float32", ("ours",)),
)


def run(setting: Setting, record: Record) -> None:
    """Measure every case."""
    record.text(
        "Contrastive risk",
        f"Forward and backward, d = {WIDTH}, tau = {TEMPERATURE}: ms, peak memory beyond the features in GB, and the "
        f"rate of the {PRODUCTS['ours']} (steered {PRODUCTS['ours, steered']}) products that it takes, beside that of "
        "`matmul` of the same shapes. TF32: float32 features with `torch.set_float32_matmul_precision('high')`; in "
        "plain torch bfloat16 features give a matrix of bfloat16 similarities, ours are float32.",
    )
    for case in CASES:
        pairs = min(case.pairs, 96 + case.pairs // 8192) if setting.small else case.pairs
        precise = case.precision != "TF32"
        torch.set_float32_matmul_precision("highest" if precise else "high")
        record.attempt(f"{case.precision}, b = {pairs}", lambda case=case, n=pairs: measure(case, n, setting, record))
        release()


def measure(case: Case, pairs: int, setting: Setting, record: Record) -> None:
    """Time the forms of one case and hold them against what is aimed at."""
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    image, text, *reference = unit_features(pairs, (WIDTH,) * 4, dtype, setting.device)
    batch = Batch(image.requires_grad_(), text.requires_grad_(), (reference[0], reference[1]))
    rate = product_rate(batch)
    times: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}
    for name in case.forms:
        times[name], memory[name], note = _figures(FORMS[name], batch)
        own = _rate(PRODUCTS.get(name), pairs, times[name])
        record.row(
            "Contrastive risk",
            pairs=pairs,
            precision=case.precision,
            form=name,
            ms=times[name],
            GB=memory[name],
            **{"TFLOP/s": own, "matmul TFLOP/s": rate, "share": ratio(own, rate)},
            note=note,
        )
        if note and name.startswith("ours"):
            record.fail(f"{name}, {case.precision}, b = {pairs}", note)
    shares = {name: ratio(_rate(count, pairs, times.get(name)), rate) for name, count in PRODUCTS.items()}
    hold(case, times, memory, shares, record)


def _figures(form: Form, batch: Batch) -> tuple[float | None, float | None, str]:
    found, note = or_reason(lambda: measured(lambda: batch.gradient(form(batch)), repeats=9))
    release()
    if found is None:
        return None, None, note
    return found.ms, None if found.peak is None else found.peak / 1e9, ""


def product_rate(batch: Batch) -> float:
    """Return the TFLOP/s of a product of the batch's shapes."""
    image, text = batch.image.detach(), batch.text.detach()
    rows = min(len(image), max(512, _PROBED_ROWS // len(image)))
    time = milliseconds(lambda: image[:rows] @ text.T)
    return 2 * rows * len(text) * image.shape[1] / time / 1e9


def _rate(products: int | None, pairs: int, time: float | None) -> float | None:
    return None if products is None or time is None else products * 2 * pairs**2 * WIDTH / time / 1e9


def hold(
    case: Case,
    times: dict[str, float | None],
    memory: dict[str, float | None],
    shares: dict[str, float | None],
    record: Record,
) -> None:
    """Hold the figures of a case against what is aimed at."""
    place = f"{case.precision}, b = {case.pairs}"
    if case.pairs == 5120 and case.precision != "bfloat16":
        for name, reach in (("ours", 1.3), ("ours, steered", 1.7)):
            times_of = ratio(times[name], times[INFO_NCE])
            record.aim(f"{place}: {name}, time against plain InfoNCE", times_of, reach, unit="x")
        for name in (_CHI_SQUARE, _CVAR):
            record.aim(f"{place}: {name}, time against KL", ratio(times[name], times["ours"]), 3.0, unit="x")
    if case.pairs == 32768 and case.precision == "TF32":
        times_of = ratio(times["ours"], times[INFO_NCE])
        record.aim(f"{place}: ours, time against plain InfoNCE", times_of, 0.6, unit="x")
    if case.pairs == 131072 and case.precision == "TF32":
        for name in _OURS:
            record.aim(f"{place}: {name}, share of the rate of matmul", shares[name], 0.6, at_least=True)
    if case.pairs == 262144 and case.precision == "TF32":
        seconds = times["ours"]
        record.aim(f"{place}: ours, seconds", None if seconds is None else seconds / 1e3, 1.5, unit="s")
        record.aim(f"{place}: ours, memory beyond the features", memory["ours"], 1.7, unit="GB")
