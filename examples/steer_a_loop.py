"""Does a reference help a training loop on data of which a part is wrong?

    python examples/steer_a_loop.py

Of 1,200 digits to train on, 40 % have a wrong label. The reference was trained on 300 others, whose labels are right.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from drrho import KL, excess_losses, penalized_risk

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
generator = torch.Generator().manual_seed(0)
few, train, test = torch.randperm(len(x), generator=generator).split([300, 1200, 297])
noisy = y.clone()
wrong = train[torch.rand(len(train), generator=generator) < 0.4]
noisy[wrong] = torch.randint(10, (len(wrong),), generator=generator)
losses_of = nn.CrossEntropyLoss(reduction="none")


def network() -> nn.Module:
    """Return a small untrained network."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(rows: torch.Tensor, targets: torch.Tensor, reference: nn.Module | None = None) -> nn.Module:
    """Return a network after 40 epochs."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(40):
        order = torch.Generator().manual_seed(epoch)
        for batch in rows[torch.randperm(len(rows), generator=order)].split(60):
            loss = losses_of(model(x[batch]), targets[batch])
            if reference is None:
                value = loss.mean()
            else:  # these lines steer
                with torch.no_grad():
                    reference_losses = losses_of(reference(x[batch]), targets[batch])
                value = penalized_risk(excess_losses(loss, reference_losses), KL(), strength=1.0).value
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return model


reference = trained(few, y)
models = {"reference": reference, "unsteered": trained(train, noisy), "steered": trained(train, noisy, reference)}
for name, model in models.items():
    right = (model(x[test]).argmax(1) == y[test]).double().mean()
    print(f"{name:10s} names {right:.1%} of held-out digits right")
