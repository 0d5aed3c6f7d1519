"""InfoNCE without the negatives that a guide finds closer: against a loop, at its limits, and over ranks."""

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from safetensors.torch import load_file, save_file

from drrho.contrastive import info_nce
from drrho.gist import guided_info_nce


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def by_loop(own, guide, tau):
    total, left_out, n = 0.0, 0, len(own[0])
    for (a, b), (c, d) in ((own, guide), (own[::-1], guide[::-1])):
        for i in range(n):
            kept = [j for j in range(n) if c[i] @ d[j] <= c[i] @ d[i]]
            total -= ((a[i] @ b[i]) / tau - torch.logsumexp(torch.stack([a[i] @ b[j] / tau for j in kept]), 0)).item()
            left_out += n - len(kept)
    return total / (2 * n), left_out


def test_negatives_take_part_that_the_guide_finds_no_closer():
    own, guide = tuple(unit(2, 9, 5)), tuple(unit(2, 9, 4, seed=1))
    found = guided_info_nce(own, guide, 0.2, counts=[9])
    loss, left_out = by_loop(own, guide, 0.2)
    assert 0 < left_out < 2 * 9 * 8
    assert found.part.item() == pytest.approx(loss, rel=1e-12)
    assert found.left_out.item() == left_out


def test_a_guide_that_finds_every_pair_closest_leaves_infonce():
    own, guide = tuple(unit(2, 7, 8)), (torch.eye(7, dtype=torch.float64),) * 2
    found = guided_info_nce(own, guide, 0.1, counts=[7])
    assert found.part.item() == pytest.approx(info_nce(*own, 0.1).item(), rel=1e-12)
    assert found.left_out.item() == 0


def test_half_features_are_compared_in_float32_also_under_autocast():
    own, guide = (tuple(part.to(torch.bfloat16) for part in unit(2, 9, 5, seed=seed)) for seed in (0, 1))
    wide = [tuple(part.float() for part in each) for each in (own, guide)]
    with torch.autocast("cpu", torch.bfloat16):
        found = guided_info_nce(own, guide, 0.05)
    expected = guided_info_nce(*wide, 0.05)
    assert found.part.dtype == torch.float32
    assert torch.equal(found.part, expected.part) and torch.equal(found.left_out, expected.left_out)


def test_other_numbers_of_pairs_and_ranks_without_counts_are_refused(tmp_path):
    own, guide = tuple(unit(2, 7, 8)), tuple(unit(2, 6, 8))
    with pytest.raises(ValueError, match="own and reference must hold the same pairs, got 6, 7 rows"):
        guided_info_nce(own, guide, 0.1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="counts must say how many rows each rank"):
            guided_info_nce(own, own, 0.1, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    counts, rows = [3, 5], slice(0, 3) if rank == 0 else slice(3, 8)
    own = [part[rows].clone().requires_grad_() for part in unit(2, 8, 5)]
    guide = tuple(part[rows] for part in unit(2, 8, 4, seed=1))
    found = guided_info_nce(tuple(own), guide, 0.2, counts=counts, group=dist.group.WORLD)
    found.part.backward()
    answer = {"part": found.part.detach(), "left_out": found.left_out}
    save_file(answer | {"image": own[0].grad, "text": own[1].grad}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_parts_of_one_loss_and_its_gradient(tmp_path):
    start_ranks(on_rank, (tmp_path,), 2)
    answers = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    own, guide = [part.clone().requires_grad_() for part in unit(2, 8, 5)], tuple(unit(2, 8, 4, seed=1))
    whole = guided_info_nce(tuple(own), guide, 0.2, counts=[8])
    whole.part.backward()
    assert sum(answer["part"].item() for answer in answers) == pytest.approx(whole.part.item(), rel=1e-12)
    assert sum(answer["left_out"].item() for answer in answers) == whole.left_out.item()
    for name, part in zip(("image", "text"), own, strict=True):
        assert torch.allclose(torch.cat([answer[name] for answer in answers]), part.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan"), torch.tensor(0.0)])
def test_temperatures_and_features_out_of_range_are_refused(temperature):
    own, guide = tuple(unit(2, 7, 8)), tuple(unit(2, 7, 4, seed=1))
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        guided_info_nce(own, guide, temperature)
    wrong = guide[0].clone()
    wrong[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"reference\[0\] and reference\[1\] must be finite"):
        guided_info_nce(own, (wrong, guide[1]), 0.1)
    with pytest.raises(TypeError, match=r"own\[0\] must have a floating dtype"):
        guided_info_nce((own[0].long(), own[1]), guide, 0.1)
