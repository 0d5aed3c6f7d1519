"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_examples_run():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["risk"].weights.sum().item() == pytest.approx(1.0, rel=1e-6)
    assert abs(names["risk"].gap.item()) < 1e-6
    assert names["model"].duality_gap_ < 1e-8


def test_folders_and_pictures_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"^\| `([a-z_/]+/)`", README, re.MULTILINE):
        assert (Path(__file__).parents[1] / path).exists(), path
