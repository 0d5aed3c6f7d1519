"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_examples_run():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["risk"].weights.sum().item() == pytest.approx(1.0, rel=1e-6)
    assert abs(names["risk"].gap.item()) < 1e-6
    step, log_u = names["step"], names["estimates"].lookup(names["index"])
    assert torch.allclose(log_u[0][:1], step.log_u[0][:1]) or names["index"].eq(names["index"][0]).sum() > 1
    assert float(step.value.detach()) > 0
    assert names["model"].duality_gap_ < 1e-8


def test_folders_and_pictures_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"^\| `([a-z_/]+/)`", README, re.MULTILINE):
        assert (Path(__file__).parents[1] / path).exists(), path
