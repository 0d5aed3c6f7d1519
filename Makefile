# `make demo` and `make test` set everything up from nothing; both need only Python 3.11 with pip, and make.
PYTHON ?= python3
# The versions that were tested, of Python 3.11; empty takes the newest.
CONSTRAINTS ?= --constraint tests/constraints.txt
BIN := .venv/bin
READY := .venv/.ready
# A process for each core, with one thread; the tests of a file stay together, because they share data. Compiled test
# files are kept, whatever the environment says of bytecode: to rewrite their assertions takes a sixth of a fast run.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST := $(TESTS) --numprocesses auto --dist loadfile
# Tests of the risks that are repeated without the compiled kernels, as on other devices.
PORTABLE := $(patsubst %,tests/test_%.py,risk risk_oracles risk_regressions optimum hybrid)

FIGURES := glyph_demo linear_models theory weak_to_strong scaling data_efficiency captions variance scheduled icons table1 claims phase_diagram

.PHONY: demo quick check test test-integrations test-lowest lint types fast-library fast-trainer figures notebooks linear phase docs bench-core bench-contrastive bench-clip gpu gpu-study chaos clean

demo: $(READY)
	$(BIN)/python experiments/clip/run.py

# The demo with a smaller model, for fewer epochs.
quick: $(READY)
	$(BIN)/python experiments/clip/run.py --quick --out outputs/quick

# For every save: what takes long is marked slow, and left to `make test`. The library's tests and the trainer's have a
# process each, which need not load the other's.
check: lint
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target types fast-library fast-trainer

# Everything.
test: lint types
	$(PYTEST)
	$(PYTEST) --portable $(PORTABLE)

# With the lowest versions that pyproject.toml allows, in an environment of their own. What old packages say of newer ones
# beside them is not ours: warnings of deprecations are no errors here. Triton 3.2, which torch 2.6 brings, interprets
# none of the kernels of rows on the CPU (its interpreter has no booleans of one bit), so they are left out.
LOWEST := .venv-lowest

test-lowest: $(LOWEST)/.ready
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 PYTHONPATH=. $(LOWEST)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile \
	  -W ignore::DeprecationWarning -W ignore::FutureWarning tests --ignore tests/test_package.py --ignore tests/test_docs.py --ignore tests/solvers/device

$(LOWEST)/.ready: pyproject.toml tests/constraints-lowest.txt hatch_build.py $(wildcard drrho/solvers/kernels*.[ch])
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint tests/constraints-lowest.txt --editable ".[convex,linear,clip-requirements,notebooks]" \
	  hatchling pytest pytest-xdist hypothesis mpmath pyarrow
	touch $(LOWEST)/.ready

# The hosts of drrho.integrations are in an environment of their own, which sees the packages of .venv.
HOSTS := .venv-integrations

test-integrations: $(HOSTS)/.ready
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(HOSTS)/bin/python -m pytest tests/integrations tests/test_docstrings.py \
	  "tests/test_examples.py::test_example[steer_a_trainer]" \
	  "tests/test_notebooks.py::test_notebook_runs_to_what_it_shows[05_steer_your_trainer]"

$(HOSTS)/.ready: $(READY)
	$(PYTHON) -m venv $(HOSTS)
	site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	  echo "import site; site.addsitedir('$$site')" > $$($(HOSTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/drrho-venv.pth
	$(HOSTS)/bin/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[integrations]"
	touch $(HOSTS)/.ready

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

# Tests that load open_clip.
TRAINER := tests/clip tests/test_paper_figures.py tests/test_accumulation.py

fast-library: $(READY)
	$(TESTS) -m "not slow" $(TRAINER:%=--ignore %)

fast-trainer: $(READY)
	$(TESTS) -m "not slow" $(TRAINER)

# A script ends with 3 where nothing of its figure is measured yet, and says what would measure it.
figures: $(READY)
	@for figure in $(FIGURES); do $(BIN)/python paper_figures/$$figure.py || [ $$? -eq 3 ] || exit 1; done

# Without network; a warning is an error. docs/README.md says why it is Sphinx, and how to check pages in a browser.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs outputs/docs
	@echo "outputs/docs/index.html"

# Notebooks are committed with what they put out. One steers hosts, and needs these.
STEERED := notebooks/05_steer_your_trainer.ipynb

notebooks: $(READY) $(HOSTS)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py $(filter-out $(STEERED),$(wildcard notebooks/*.ipynb))
	OMP_NUM_THREADS=1 $(HOSTS)/bin/python notebooks/execute.py $(STEERED)

linear: $(READY)
	$(BIN)/python experiments/linear/run.py
	$(BIN)/python paper_figures/linear_models.py --tables

# 20 minutes of one core.
phase: $(READY)
	$(BIN)/python experiments/linear/phase.py
	$(BIN)/python experiments/linear/towers.py
	$(BIN)/python paper_figures/phase_diagram.py

# The packages it is compared with are an extra of their own: they bring about 0.8 GB, which the tests do not need.
bench-core: $(READY)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python experiments/benchmarks/core.py
	OMP_NUM_THREADS=1 $(BIN)/python experiments/benchmarks/linear_models.py
	OMP_NUM_THREADS=1 $(BIN)/python experiments/benchmarks/kernels.py

bench-contrastive: $(READY)
	$(BIN)/python experiments/benchmarks/contrastive.py
	$(BIN)/python experiments/benchmarks/contrastive_ranks.py
	$(BIN)/python experiments/benchmarks/running_state.py

# The first makes an environment of its own for open_clip_train, of about 3 GB.
bench-clip: $(READY)
	$(BIN)/python experiments/benchmarks/throughput.py
	$(BIN)/python experiments/benchmarks/validation_memory.py

# On a GPU, by the machine's own Python where its torch sees one: nothing is installed, and what is missing comes by
# PYTHONPATH. `make gpu` measures everything; `make gpu GPU="--only core --packages FOLDER"` passes options on.
# `make gpu-study` trains what is left of the large grid on icons; given again, it goes on.
SEES_GPU := -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
STUDY ?= --seconds 400

gpu: PROGRAM = -m experiments.benchmarks.gpu $(GPU)
gpu-study: PROGRAM = experiments/clip/run.py study --data icons --large $(STUDY)

gpu gpu-study:
	@for python in $(PYTHON) $(BIN)/python; do \
	  if $$python $(SEES_GPU) 2>/dev/null; then exec env PYTHONPATH=.:$$PYTHONPATH $$python $(PROGRAM); fi; \
	done; echo "make $@: neither $(PYTHON) nor $(BIN)/python has a torch that sees a GPU" >&2; exit 2

# Given again after an interruption, it goes on with the trials that are left.
chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.benchmarks.chaos

# Made last, so that an interrupted installation is started over; old when a requirement changes.
$(READY): pyproject.toml tests/constraints.txt hatch_build.py $(wildcard drrho/solvers/kernels*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[all]"
	touch $(READY)

clean:
	rm -rf .venv .venv-integrations .venv-lowest outputs cache
