"""Builds the CPU kernels with the system's C compiler; without one, the library runs on torch operations alone.

An editable installation has the trainer of its checkout too: a package `drrho_clip` that stands for
`experiments/clip`, and the command `drrho-clip`. Everybody else has them from the distribution of that name.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("drrho/solvers")
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-s"]
LIBRARIES = ["-lm", "-pthread"]
#: Of a checkout; a source distribution has none.
TRAINER = Path("experiments/clip")
#: By what torch calls the processor's capability; "default" runs anywhere.
LEVELS = {"default": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # Hardly any processor of today has neither of the others: there, size counts.
    LEVELS |= {
        "default": ["-Os"],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    }


class KernelBuildHook(BuildHookInterface):
    """Compiles ``kernels*.c`` once for each instruction set into shared libraries beside them."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform."""
        root = Path(self.root)
        if version == "editable" and (root / TRAINER).is_dir():
            self._add_trainer(root / TRAINER, build_data)
        sources = sorted(str(source) for source in (root / FOLDER).glob("kernels*.c"))
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
        with ThreadPoolExecutor() as pool:  # each waits for a compiler
            said = list(pool.map(lambda level: _compile(compiler, level, root, sources), LEVELS))
        for level, message in zip(LEVELS, said, strict=True):
            library = root / FOLDER / f"_kernels_{level}.so"
            if message is None:
                build_data["artifacts"].append(str(library.relative_to(root)))
            else:
                self.app.display_warning(f"{library.name} was not built: {message}")
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

    def _add_trainer(self, trainer: Path, build_data: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        package, command = (Path(self._folder.name, name) for name in ("__init__.py", "drrho-clip"))
        package.write_text(
            f'"""The trainer of a checkout, under the name of an installation."""\n\n__path__ = {[str(trainer)]!r}\n'
        )
        command.write_text("#!python\nfrom drrho_clip.run import console\n\nconsole()\n")
        command.chmod(0o755)
        build_data["force_include_editable"][str(package)] = "drrho_clip/__init__.py"
        build_data["shared_scripts"][str(command)] = command.name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what only the build needed."""
        if self._folder:
            self._folder.cleanup()


def _compile(compiler: list[str], level: str, root: Path, sources: list[str]) -> str | None:
    """Return what the compiler said where it did not make the library of a level."""
    library = root / FOLDER / f"_kernels_{level}.so"
    partial = library.with_suffix(".partial")
    command = [*compiler, *FLAGS, *LEVELS[level], "-o", str(partial), *sources, *LIBRARIES]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        partial.replace(library)  # never a half-written library, nor one that is loaded now
    except (OSError, subprocess.CalledProcessError) as error:
        library.unlink(missing_ok=True)  # of an older source
        return getattr(error, "stderr", "") or str(error)
    return None
