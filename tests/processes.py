"""Ranks of a test as processes that are forked from one which has imported what takes long."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

#: For a test that shards a model with FSDP2, which needs torch 2.7 on the CPU.
needs_shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"torch {torch.__version__} shards nothing on the CPU"
)

PRELOADED = [
    *("pytest", "torch.distributed", "torch._dynamo", "drrho"),
    *("drrho.accumulation", "drrho.contrastive", "drrho.distillation", "drrho.running", "drrho.selection"),
    *("drrho.temperature", "drrho.variance"),
]


def start_ranks(work, arguments, count, join=True):
    """Run ``work(rank, *arguments)`` in that many processes, as `torch.multiprocessing.spawn` does."""
    return multiprocessing.start_processes(work, arguments, count, join, start_method="forkserver")
