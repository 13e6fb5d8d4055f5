# Front doors. Each makes its own virtual environment when there is none and installs everything it needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Tests run side by side, each process of them with one thread: more would only wait for each other. A worker takes
# a file at a time, so that what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder
WORKERS     ?= 2
FEDERATIONS ?= 2
SEEDS       ?= 5

.PHONY: help demo test quick test-long check docs doctor intake bench-round bench-large bench-secagg bench-dp bench-data bench-predict bench-step clean

help:                     ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

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

quick: check              ## lint, types, and the tests that take next to no time
	$(PYTEST) -n $(WORKERS) -m quick tests/architecture tests/unit

# Federations mostly wait; nothing that computes runs beside them and delays their answers. The types are checked, by
# one process, while the other tests run.
test: $(READY)            ## everything
	$(BIN)/ruff check .
	@$(BIN)/mypy & types=$$!; $(PYTEST) -n $(WORKERS) -m "not federation"; tests=$$?; wait $$types && exit $$tests
	$(PYTEST) -n $(FEDERATIONS) -m "federation and not long" tests/federation

test-long: check          ## properties and attacks again and again, each time from another seed
	for each in $$(seq $(SEEDS)); do seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); echo "seed $$seed"; \
	    $(PYTEST) -n $(WORKERS) --hypothesis-seed=$$seed tests/properties tests/attacks tests/audit || exit 1; done
	$(PYTEST) -n $(FEDERATIONS) -m long tests/federation

docs: $(READY)           ## all pages as a site that needs no network: build/docs/index.html
	$(BIN)/mkdocs build --strict
	@echo 'build/docs/index.html; with a search: python3 -m http.server --directory build/docs'

doctor: $(READY)         ## plants every fault at a site and a server, and writes docs/results/doctor.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.doctor

intake: $(READY)         ## inputs with every trap and foreign DICOM files through the intake: docs/results/data.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.intake

bench-round: $(READY)    ## what a round and waiting cost outside training, as users run them
	PYTHONPATH=. $(BIN)/python tests/bench/round_cost.py

bench-large: $(READY)    ## memory of every program in a study of 33.6 million parameters
	PYTHONPATH=. $(BIN)/python tests/bench/large_model.py

bench-secagg: $(READY)   ## what secure aggregation costs, beside Flower's own and a plain sum
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/bench/secagg.py --long

bench-dp: $(READY)       ## what private training costs, beside plain training and Opacus
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/bench/dp_training.py

bench-step: $(READY)     ## what a study's private step takes, on one core and on all, beside a plain one
	PYTHONPATH=. $(BIN)/python tests/bench/study_step.py

bench-data: $(READY)     ## what preparing an image archive costs: time and memory, with the store and without
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/bench/preparation.py

bench-predict: $(READY)   ## what the prediction service takes, beside plain onnxruntime
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/bench/prediction.py

clean:
	rm -rf $(VENV) demo build
