"""Ranks of a test as processes that are forked from one which has imported what takes long."""

import torch.multiprocessing as multiprocessing

PRELOADED = [
    *("pytest", "torch.distributed", "torch._dynamo", "drrho"),
    *("drrho.accumulation", "drrho.contrastive", "drrho.distillation", "drrho.running", "drrho.selection"),
    *("drrho.temperature", "drrho.variance"),
]


def start_ranks(work, arguments, count, join=True):
    """Run ``work(rank, *arguments)`` in that many processes, as `torch.multiprocessing.spawn` does."""
    return multiprocessing.start_processes(work, arguments, count, join, start_method="forkserver")
