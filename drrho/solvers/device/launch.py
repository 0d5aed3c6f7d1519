"""Launches that cost the host little: what a kernel is compiled to is looked up by a key of the caller's."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


class Launcher(NamedTuple):
    """Launches kernels on one device's current stream.

    ``key`` tells apart all calls that differ in dtype, in the alignment of a pointer, or in which arguments are None.
    """

    key: Hashable
    stream: int | None

    @classmethod
    def on(cls, device: torch.device, *key: Hashable) -> Launcher:
        """Return a launcher for the device; on the CPU Triton's interpreter runs the kernels."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        return cls((device, *key), stream)

    def __call__(self, kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
        """Launch a kernel whose compile-time arguments are the last, and given by name, like Triton's own options."""
        key = (kernel, self.key, *options.values())
        found = _compiled.get(key)
        if found is None:
            compiled = kernel[grid](*arguments, **options)
            if self.stream is not None:
                constants = kernel.arg_names[len(arguments) :]
                _compiled[key] = compiled, tuple(options[name] for name in constants)
            return
        compiled, constants = found
        compiled[(*grid, 1)](*arguments, *constants, stream=self.stream)
