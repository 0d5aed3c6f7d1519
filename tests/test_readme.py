"""The code of the pages runs as printed, what they link to exists, and the README stays short."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README, RISKS, CHOOSING = (ROOT / name for name in ("README.md", "drrho/README.md", "drrho/CHOOSING.md"))
MOST_LINES, MOST_WORDS = 120, 900


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_loop_of_the_readme_runs():
    (block,) = blocks_of(README)
    torch.manual_seed(0)
    x, y = torch.randn(512, 8), torch.randint(0, 2, (512,))
    target, criterion = torch.nn.Linear(8, 2), torch.nn.CrossEntropyLoss(reduction="none")
    before = target.weight.detach().clone()
    names = {"target": target, "criterion": criterion, "reference_losses": criterion(torch.zeros(512, 2), y)}
    names["optimizer"] = torch.optim.AdamW(target.parameters(), lr=1e-2)
    names["loader"] = [(index, x[index], y[index]) for index in torch.randperm(512).split(64)]
    exec(block, names)
    assert names["step"].weights.sum().item() == pytest.approx(1.0, rel=1e-6)
    assert not torch.equal(target.weight, before)
    assert len(re.findall(r"^.*\S.*$", block.partition("\n\n")[2], re.MULTILINE)) == 6  # below the imports


def test_code_of_the_risks_runs():
    torch.manual_seed(0)
    blocks = blocks_of(RISKS)
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
    blocks = blocks_of(CHOOSING)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["choice"].rho in (0, 1, 3, 10)
    assert names["calibrated"].rho > names["calibrated"].normal == pytest.approx(1.35, abs=0.01)
    assert 0 <= names["coefficient"].coefficient <= 1
    assert names["fair"].mean() > 0 and names["steered"].duality_gap_ < 1e-6
    assert names["perplexity"] / len(names["own"]) == pytest.approx(names["share"], rel=1e-6)


@pytest.mark.parametrize("page", [README, RISKS, CHOOSING], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page):
    """A link to a heading has the heading's words, as forges write them in an address."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS
