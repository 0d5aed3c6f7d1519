# `make demo` and `make test` set everything up from nothing; both need only Python 3.11 with pip, and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test figures clean

demo: $(READY)
	$(BIN)/python experiments/clip/run.py

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

figures: $(READY)
	$(BIN)/python paper_figures/glyph_demo.py

# Made last, so that an interrupted installation is started over; old when a requirement changes.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[all]"
	touch $(READY)

clean:
	rm -rf .venv outputs cache
