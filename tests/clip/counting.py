"""Counts what would wait for a device, and exchanges between ranks, by the operations that a program calls."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its shape, the host needs before it can go on.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "allclose"}
_READS |= {"_unique2", "unique_dim", "unique_consecutive"}
_METHODS = ("tolist", "cpu")  # on the CPU they call no operation; a device's tensor has no numpy() that could


class Counting(TorchDispatchMode):
    """Counts reads of values and exchanges between ranks while it is active.

    Attributes
    ----------
    reads, exchanges : Counter
        How often, by the name of the operation.
    """

    def __init__(self):
        super().__init__()
        self.reads, self.exchanges = Counter(), Counter()
        self._is_paused, self._originals = False, {}

    def __enter__(self):
        self._originals = {name: getattr(torch.Tensor, name) for name in _METHODS}
        for name in _METHODS:
            setattr(torch.Tensor, name, self._counted(name))
        return super().__enter__()

    def __exit__(self, *error):
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)
        return super().__exit__(*error)

    @contextmanager
    def paused(self):
        """Count nothing in the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def totals(self):
        """Return the number of reads and of exchanges so far."""
        return self.reads.total(), self.exchanges.total()

    def _counted(self, name):
        original = self._originals[name]

        def method(tensor, *arguments, **options):
            self.reads[name] += not self._is_paused
            return original(tensor, *arguments, **options)

        return method

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        space, name = operation.name().split("::")
        name = name.partition(".")[0]
        if not self._is_paused:
            self.exchanges[name] += space == "c10d"
            self.reads[name] += name in _READS or (name.startswith("index") and _has_mask(arguments))
        return operation(*arguments, **(options or {}))


def _has_mask(arguments):
    """Whether entries are chosen by a boolean mask, whose number of true entries is the shape of the result."""
    masks = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else ()
    return any(isinstance(mask, torch.Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
