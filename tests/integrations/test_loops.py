"""Stock training scripts of each host: what changes in them to be steered, at most three lines, and that they run."""

import difflib
import os

import pytest
import torch

PYTORCH = """
import torch
from torch.nn.functional import cross_entropy

for x, y in loader:
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

LIGHTNING = """
import lightning
import torch
from torch.nn.functional import cross_entropy

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

trainer = lightning.Trainer(
    max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    accelerator="cpu", default_root_dir=folder,
)
trainer.fit(Module(), loader)
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for x, y in loader:
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
"""

TRAINER = """
from transformers import Trainer

trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    data_collator=collator,
)
trainer.train()
trainer.evaluate()
"""

SFT = """
from trl import SFTTrainer

trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=train_dataset,
    processing_class=tokenizer,
)
trainer.train()
"""

LOOP = [
    ("import torch\n", "import torch\nimport drrho.integrations\n"),
    (
        "\nfor x, y in loader:",
        "\nsteering = drrho.integrations.Steering(drrho.KL(), strength=1.0)\nfor x, y in loader:",
    ),
    (
        "    loss = cross_entropy(model(x), y)",
        '    loss = steering(*(cross_entropy(m(x), y, reduction="none") for m in (model, reference))).loss',
    ),
]
CHANGES = {
    "PyTorch": (PYTORCH, LOOP),
    "Accelerate": (ACCELERATE, LOOP),
    "Lightning": (
        LIGHTNING,
        [
            ("import torch\n", "import torch\nimport drrho.integrations\n"),
            (
                "        self.model = model\n",
                "        self.model = model\n"
                "        self.steering = drrho.integrations.Steering(drrho.KL(), strength=1.0)\n",
            ),
            (
                "        return cross_entropy(self.model(x), y)",
                "        return self.steering("
                '*(cross_entropy(m(x), y, reduction="none") for m in (self.model, reference))).loss',
            ),
        ],
    ),
    "Trainer": (
        TRAINER,
        [
            (
                "from transformers",
                "from drrho import KL\nfrom drrho.integrations.trainer import steered\nfrom transformers",
            ),
            ("Trainer(\n", "steered(Trainer, KL(), strength=1.0, reference=reference, cache=folder)(\n"),
        ],
    ),
    "SFTTrainer": (
        SFT,
        [
            ("from trl", "from drrho import KL\nfrom drrho.integrations.trainer import steered\nfrom trl"),
            ("SFTTrainer(\n", "steered(SFTTrainer, KL(), strength=1.0, reference=reference, cache=folder)(\n"),
        ],
    ),
}
NEEDS = {"PyTorch": "torch", "Accelerate": "accelerate", "Lightning": "lightning", "Trainer": "transformers"}


def changed(host):
    script, replacements = CHANGES[host]
    for old, new in replacements:
        assert script.count(old) == 1
        script = script.replace(old, new)
    return script


def names_for(host, folder):
    """What a stock script has defined before: a model, its data and a reference."""
    if host in ("Trainer", "SFTTrainer"):
        from integrations.hosts import decoder, sentences, tokenizer
        from integrations.test_trainer import settings
        from transformers import DataCollatorForSeq2Seq, TrainingArguments
        from trl import SFTConfig

        common = {"model": decoder(), "reference": decoder(1), "train_dataset": sentences(), "folder": folder / "cache"}
        common |= {"eval_dataset": sentences(8, 1), "tokenizer": tokenizer()}
        kind = TrainingArguments if host == "Trainer" else SFTConfig
        return common | {"arguments": settings(folder, kind), "collator": DataCollatorForSeq2Seq(tokenizer())}
    torch.manual_seed(0)
    model, reference = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3).requires_grad_(False)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    loader = torch.utils.data.DataLoader(data, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {"model": model, "reference": reference, "loader": loader, "optimizer": optimizer, "folder": str(folder)}


@pytest.mark.parametrize("host", CHANGES)
def test_at_most_three_lines_change(host):
    before, after = (script.splitlines() for script in (CHANGES[host][0], changed(host)))
    lines = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert 1 <= len(lines) <= 3


@pytest.mark.filterwarnings("default")  # hosts warn of their own deprecations
@pytest.mark.parametrize("host", [pytest.param(h, marks=pytest.mark.slow) if h in NEEDS else h for h in CHANGES])
def test_the_changed_script_trains_another_model_than_the_stock_script(tmp_path, host):
    pytest.importorskip(NEEDS.get(host, "trl"), reason="needs the extra integrations (make test-integrations)")
    weights = []
    for script in (CHANGES[host][0], changed(host)):
        names = names_for(host, tmp_path)
        exec(script, names)
        weights.append(torch.cat([part.detach().flatten() for part in names["model"].parameters()]))
    assert not torch.allclose(*weights, rtol=1e-3)
    assert weights[1].isfinite().all()


@pytest.mark.filterwarnings("default")
def test_lightning_and_accelerate_give_the_loss_curve_of_a_plain_loop(tmp_path):
    for package in ("accelerate", "lightning"):
        pytest.importorskip(package, reason="needs the extra integrations (make test-integrations)")
    weights = {}
    for host in ("PyTorch", "Accelerate", "Lightning"):
        names = names_for(host, tmp_path)
        exec(changed(host), names)
        weights[host] = names["model"].state_dict()["weight"]
    assert torch.allclose(weights["Accelerate"], weights["PyTorch"], rtol=1e-6)
    assert torch.allclose(weights["Lightning"], weights["PyTorch"], rtol=1e-6)
    assert os.listdir(tmp_path) == []
