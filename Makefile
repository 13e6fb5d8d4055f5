# Front doors. Each makes its own virtual environment when there is none and installs everything it needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check bench bench-secagg bench-dp clean

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Consilium needs Python 3.11 or newer: make PYTHON=/path/to/python3 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)            ## four hospitals on this machine, two studies, about five minutes
	$(BIN)/python -m consilium_deploy.demo

check: $(READY)           ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check               ## everything the gate runs
	$(BIN)/python -m pytest -q

bench: $(READY)          ## what a round costs outside training
	$(BIN)/python tests/bench/round_cost.py

bench-secagg: $(READY)   ## what secure aggregation costs, beside Flower's own and a plain sum
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/secagg.py --long

bench-dp: $(READY)       ## what private training costs, beside plain training and Opacus
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/dp_training.py

clean:
	rm -rf $(VENV) demo build
