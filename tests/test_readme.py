"""The code of the README and of the page on choosing runs as printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHOOSING = (ROOT / "drrho" / "CHOOSING.md").read_text()


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


@pytest.mark.slow
def test_choosing_runs_and_says_what_is_true():
    blocks = re.findall(r"```python\n(.*?)```", CHOOSING, re.DOTALL)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["choice"].rho in (0, 1, 3, 10)
    assert names["calibrated"].rho > names["calibrated"].normal == pytest.approx(1.35, abs=0.01)
    assert 0 <= names["coefficient"].coefficient <= 1
    assert names["fair"].mean() > 0 and names["steered"].duality_gap_ < 1e-6
    assert names["perplexity"] / len(names["own"]) == pytest.approx(names["share"], rel=1e-6)


def test_the_page_on_choosing_points_to_what_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", CHOOSING):
        assert (ROOT / "drrho" / path).exists(), path


def test_folders_and_pictures_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"^\| `([a-z_/]+/)`", README, re.MULTILINE):
        assert (ROOT / path).exists(), path
