"""The page on steering runs as printed, and points to what exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "drrho" / "integrations" / "README.md"
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
}


def run(blocks, names):
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    return names


def test_a_loop_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(SECTIONS["Steer your own loop"]) == 3
    names = run(SECTIONS["Steer your own loop"], {})
    assert names["step"].weights.sum().item() == pytest.approx(1)
    assert names["model"].weight.grad.abs().sum() > 0
    assert len(names["stored"]) == 64 and (tmp_path / "reference-of-my-data").is_dir()


def test_any_estimator():
    import drrho

    assert len(SECTIONS["Steer any estimator"]) == 1
    names = run(SECTIONS["Steer any estimator"], {"drrho": drrho})
    assert names["weights"].mean() == pytest.approx(1) and names["weights"].min() >= 0


@pytest.mark.slow  # imports transformers
@pytest.mark.filterwarnings("default")
def test_a_trainer(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra integrations (make test-integrations)")
    monkeypatch.chdir(tmp_path)
    assert len(SECTIONS["Steer your Trainer"]) == 1
    names = run(SECTIONS["Steer your Trainer"], {})
    assert names["trainer"].steering_step.weights.sum().item() == pytest.approx(1, rel=1e-5)
    assert len(list((tmp_path / "reference-losses").iterdir())) == 8


def test_links_lead_somewhere():
    text = PAGE.read_text()
    anchors = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert path[1:] in anchors if path.startswith("#") else (PAGE.parent / path).exists(), path
