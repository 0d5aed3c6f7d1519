"""The towers: parts of a batch, precisions, dropout."""

import dataclasses

import pytest
import torch
from training_runs import SHORT, built, contrastive, run

from experiments.clip.errors import Interrupted
from experiments.clip.training.options import Optimization


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drrho", "siglip", "drrho on rho top-k"])
def test_a_batch_in_parts_takes_the_same_steps(name, pairs, features, reference, tmp_path):
    ends = []
    for parts in (1, 3):
        optimization = Optimization(epochs=1, batch_size=32, lr=1e-3, warmup=2, accumulation=parts)
        given = built(name, pairs, features, reference, optimization)
        clip, history, _ = run(pairs, checkpoints=tmp_path / f"{parts}", **given)
        ends.append((history[-1]["loss"], torch.cat([value.flatten() for value in clip.model.state_dict().values()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert (ends[0][1] - ends[1][1]).abs().max() <= 2e-4  # a fifth of one step of Adam


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"precision": "float16"}, {"activation_checkpointing": True}]
)
def test_towers_in_other_precisions_stay_near_float32(options, pairs, features, tmp_path):
    _, history, _ = run(pairs, contrastive(len(pairs)), tmp_path / "a", features)
    found, other, _ = run(pairs, contrastive(len(pairs)), tmp_path / "b", features, **options)
    tolerance = 0.05 if "precision" in options else 1e-5
    assert other[-1]["loss"] == pytest.approx(history[-1]["loss"], abs=tolerance * abs(history[0]["loss"]))
    assert all(value.dtype == torch.float32 for value in found.model.state_dict().values() if value.is_floating_point())


@pytest.mark.slow
def test_dropped_patches_of_candidates_and_parts_resume_at_the_same_bits(pairs, features, reference, tmp_path):
    options = {"patch_dropout": 0.5, "precision": "bfloat16", "activation_checkpointing": True}
    optimization = dataclasses.replace(SHORT, accumulation=2)
    given = ("openclip on jest", pairs, features, reference, optimization)
    whole, history, _ = run(pairs, checkpoints=tmp_path / "a" / "c", **built(*given), **options)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, checkpoints=tmp_path / "b" / "c", stop=lambda: next(left), **built(*given), **options)
    again, resumed, _ = run(pairs, checkpoints=tmp_path / "b" / "c", **built(*given), **options)
    assert resumed == history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
