"""Features and labels drawn from a seed."""

import torch


def features(count, seed, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def integers(low, high, count, seed):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))
