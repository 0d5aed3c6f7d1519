"""Named settings of ``train``: the embedded glyphs' and those of published recipes, as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..models.options import ModelInputs
from ..training.options import CheckpointPolicy, Execution, Loss, Optimization
from .defaults import ADAMW_OF_OTHERS, ADAMW_OF_TRANSFORMERS
from .options import Data, Shards, Train

#: What the names of presets for the embedded pairs begin with.
EMBEDDED = "glyph-"

# Small models of small images: they learn at a higher rate, are warm in 50 steps, and alike on all devices.
_GLYPHS = Train(
    model="glyph-small",
    optimization=Optimization(epochs=16, lr=2e-3, warmup=50),
    execution=Execution(precision="float32"),
)
#: Where options start that no preset or stored configuration does, by the source of the pairs.
STARTS: dict[str, Train] = {"glyphs": _GLYPHS, "icons": _GLYPHS, "catalog": Train()}


def of_embedded_pairs(**optimization: Any) -> dict[str, Any]:
    """Return the options of a `Train` that all trainings on the embedded pairs share; ``optimization`` differs."""
    own = dataclasses.replace(_GLYPHS.optimization, **optimization)
    return {"optimization": own, "execution": _GLYPHS.execution}


PRESETS: dict[str, Train] = {
    f"{EMBEDDED}reference": Train(
        model="glyph-base",
        split="reference",
        data=Data(captions="clean"),
        loss=Loss(method="openclip"),
        **of_embedded_pairs(epochs=36),
        out=Path("outputs/glyph-reference"),
        validations=6,
        weights="float16",
    ),
    # Both tuned alike on the validation split: the README.md of the trainer says what was tried.
    f"{EMBEDDED}steered": Train(model=_GLYPHS.model, **of_embedded_pairs(epochs=9), out=Path("outputs/glyph-steered")),
    f"{EMBEDDED}unsteered": Train(
        model=_GLYPHS.model,
        loss=Loss(method="fastclip", temperature=0.2),
        **of_embedded_pairs(epochs=9),
        out=Path("outputs/glyph-unsteered"),
    ),
}

# The heads of towers that two public models are, trained on the other pool of the icons. The towers are as they were
# published, their pixels too; a core does 270 pictures of 64 x 64 in a second.
PRESETS["icon-public"] = Train(
    model="icon-public",
    pretrained=Path("cache/public-towers.safetensors"),
    inputs=ModelInputs(image_mean=(0.498, 0.498, 0.498), image_std=(0.502, 0.502, 0.502)),
    lock=("image", "text"),
    unlocked_text_groups=1,
    split="reference",
    data=Data(kind="icons", pixels=32),
    loss=Loss(method="openclip"),
    **of_embedded_pairs(epochs=2, batch_size=128, lr=1e-3),
    out=Path("outputs/icon-public"),
    validations=2,
)
# Of pictures of 64 x 64 that stay in memory: both pools of the icons, and never the held-out ones.
PRESETS["icon-reference"] = Train(
    model="icon-base",
    shards=Shards(in_memory=True),
    loss=Loss(method="openclip"),
    optimization=Optimization(epochs=6, batch_size=256, lr=2e-3, warmup=100, schedule="cooldown", cooldown_steps=1100),
    execution=Execution(precision="float32"),
    out=Path("outputs/icon-reference"),
    weights="float16",
)

_VIT, _RESNET = ADAMW_OF_TRANSFORMERS, ADAMW_OF_OTHERS
_MIXED = Execution(precision="bfloat16")
_SELDOM = CheckpointPolicy(checkpoint_minutes=15.0)


def _fastclip_v3(model: str, out: str, rho: float, optimization: Optimization, **loss: Any) -> Train:
    """Return FastCLIP v3's recipe; its values of rho suppose its own gradient of the temperature."""
    return Train(
        model=model,
        loss=Loss(
            method="fastclip",
            temperature=0.07,
            temperature_scheme="global",
            rho=rho,
            published_temperature_gradient=True,
            **loss,
        ),
        optimization=optimization,
        execution=_MIXED,
        out=Path("outputs") / out,
        keeping=_SELDOM,
        validations=optimization.epochs,
    )


# Wei et al., 2024 (FastCLIP, arXiv:2407.01445), and Wei et al., ICML 2025 (DRRho-CLIP, arXiv:2505.06699).
_DFN = Optimization(epochs=7, batch_size=5120, lr=3.125e-4, weight_decay=0.2, warmup=500, **_VIT)
PRESETS |= {
    "drrho-dfn192m": Train(
        model="ViT-B-16",
        loss=Loss(
            method="drrho",
            temperature=0.01,
            eps=1e-4,
            final_gamma=1.0,
            reference=Path("references/vit_base_patch32_clip_224.openai"),
        ),
        optimization=_DFN,
        execution=_MIXED,
        out=Path("outputs/drrho-dfn192m"),
        keeping=_SELDOM,
        validations=7,
    ),
    "fastclip-dfn192m": _fastclip_v3(
        "ViT-B-16",
        "fastclip-dfn192m",
        11.0,
        _DFN,
        temperature_lr=7.8125e-5,
        temperature_lr_schedule="threshold",
        final_gamma=1.0,
        eps=1e-14,
    ),
    "fastclip-cc3m": _fastclip_v3(
        "RN50",
        "fastclip-cc3m",
        6.5,
        Optimization(epochs=37, batch_size=1024, lr=1e-3, weight_decay=0.1, warmup=10_000, **_RESNET),
        temperature_lr=2e-4,
        temperature_lr_schedule="threshold",
        final_gamma=0.2,
        gamma_epochs=18,
        eps=1e-14,
    ),
    "fastclip-cc12m": _fastclip_v3(
        "ViT-B-32",
        "fastclip-cc12m",
        8.5,
        Optimization(epochs=33, batch_size=2048, lr=4e-4, weight_decay=0.1, warmup=10_000, **_VIT),
        temperature_lr=1e-4,
        temperature_lr_schedule="threshold",
        final_gamma=0.2,
        gamma_epochs=16,
        eps=1e-14,
    ),
    "fastclip-laion400m": _fastclip_v3(
        "ViT-B-16",
        "fastclip-laion400m",
        16.0,
        Optimization(epochs=30, batch_size=5120, lr=2e-4, lr_min=4e-5, weight_decay=0.2, warmup=13_200, **_VIT),
        temperature_lr=5e-5,
        temperature_lr_schedule="threshold",
        final_gamma=0.8,
        gamma_epochs=10,
        eps=1e-6,
    ),
}


def _datacomp(name: str, model: str, millions: float, optimization: Optimization) -> Train:
    """Return a scale of DataComp (Gadre et al., 2023, arXiv:2304.14108): so many million samples seen, in 8 parts."""
    return Train(
        model=model,
        shards=Shards(resampled=True, epoch_samples=round(millions * 1e6 / 8)),
        loss=Loss(method="openclip"),
        optimization=dataclasses.replace(optimization, epochs=8, weight_decay=0.2, adam_eps=1e-6),
        execution=dataclasses.replace(_MIXED, activation_checkpointing=True),
        out=Path(f"outputs/{name}"),
        keeping=_SELDOM,
        validations=8,
    )


_SCALE = Optimization(batch_size=4096, lr=5e-4, warmup=500, betas=(0.9, 0.98))
PRESETS |= {
    name: _datacomp(name, model, millions, optimization)
    for name, model, millions, optimization in (
        ("datacomp-small", "ViT-B-32", 12.8, _SCALE),
        ("datacomp-medium", "ViT-B-32", 128.0, _SCALE),
        ("datacomp-large", "ViT-B-16", 1280.0, dataclasses.replace(_SCALE, batch_size=8192)),
        (
            "datacomp-xlarge",
            "ViT-L-14",
            12_800.0,
            Optimization(batch_size=90_112, lr=1e-3, warmup=10_000, betas=(0.9, 0.95)),
        ),
    )
}


def is_of_embedded_pairs(name: str) -> bool:
    """Return whether a preset is for pairs that the program makes, glyphs or icons, and not for a catalog."""
    return name.startswith(EMBEDDED) or PRESETS[name].data.kind == "icons"
