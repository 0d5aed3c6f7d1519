"""Programs in processes of their own, forked from one that has imported what takes them seconds each.

`Launched` has the names of `subprocess.Popen`. A process has its own environment, output and signals, and runs the file
as ``python FILE ...`` would; what a process costs before its first line is tested by `test_imports` and `test_run`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import processes

PROGRAM = Path(__file__).parents[2] / "experiments" / "clip" / "run.py"

PRELOADED = [
    *processes.PRELOADED,
    *("sklearn.metrics", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("experiments.clip.cli.train", "experiments.clip.cli.commands", "experiments.clip.evaluation.tasks"),
    *("experiments.clip.glyphs.demo", "experiments.clip.study.runner"),
]

_forks = multiprocessing.get_context("forkserver")


class Launched:
    """One process; its output goes to files, so that it never waits for a reader."""

    def __init__(self, *arguments, program=PROGRAM, environment=None):
        self._files = [tempfile.TemporaryFile() for _ in ("output", "errors")]
        paths = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        words = [str(program), *map(str, arguments)]
        self._process = _forks.Process(target=_run, args=(words, os.environ | (environment or {}), paths))
        self._process.start()
        atexit.register(self._process.kill)  # before the interpreter would wait for it

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("run.py", timeout)
        return self._process.exitcode

    def communicate(self, timeout=None):
        """Wait for its end; return what it wrote to standard output and to standard error."""
        self.wait(timeout)
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read().decode())
        return texts


def _run(words, environment, paths):
    for path, number in zip(paths, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
