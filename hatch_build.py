"""Builds the CPU kernels with the system's C compiler; without one, the library runs on torch operations alone."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("drrho/solvers")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LIBRARIES = ["-lm", "-pthread"]
#: By what torch calls the processor's capability; "default" runs anywhere.
LEVELS = {"default": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    }


class KernelBuildHook(BuildHookInterface):
    """Compiles ``kernels*.c`` once for each instruction set into shared libraries beside them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform."""
        root = Path(self.root)
        sources = sorted(str(source) for source in (root / FOLDER).glob("kernels*.c"))
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
        for level, flags in LEVELS.items():
            library = root / FOLDER / f"_kernels_{level}.so"
            partial = library.with_suffix(".partial")
            command = [*compiler, *FLAGS, *flags, "-o", str(partial), *sources, *LIBRARIES]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                partial.replace(library)  # never a half-written library, nor one that is loaded now
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
                library.unlink(missing_ok=True)  # of an older source
                self.app.display_warning(f"{library.name} was not built: {said}")
                continue
            build_data["artifacts"].append(str(library.relative_to(root)))
        if not build_data["artifacts"]:
            self.app.display_warning(
                f"drrho is installed without its compiled kernels, because {compiler[0]} did not build them: risks on "
                "the CPU will be solved by torch operations, several times slower. Install a C compiler (gcc or clang; "
                "CC names another) and install drrho again."
            )
        if build_data["artifacts"] and version != "editable":
            build_data["pure_python"] = False
            tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{tag}"
