# `make demo` and `make test` set everything up from nothing; both need only Python 3.11 with pip, and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test figures bench-core clean

demo: $(READY)
	$(BIN)/python experiments/clip/run.py

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

figures: $(READY)
	$(BIN)/python paper_figures/glyph_demo.py

# The packages it is compared with are an extra of their own: they bring about 0.8 GB, which the tests do not need.
bench-core: $(READY)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python experiments/benchmarks/core.py

# Made last, so that an interrupted installation is started over; old when a requirement changes.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[all]"
	touch $(READY)

clean:
	rm -rf .venv outputs cache
