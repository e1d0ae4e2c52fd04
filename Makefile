# Two commands matter: `make calibrate` (the main job) and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A bare `torch` may bring gigabytes of CUDA; this build serves the tests and the CPU kernel. The
# package itself accepts a range, so installing adaptive-moe elsewhere keeps the torch that is there.
TORCH ?= torch==2.13.0
# A shape on which one-shot and multi-phase cross on a CPU. ARGS="--model NAME", "--config PATH" or
# "--experts N ..." takes its place.
SHAPE := --experts 8 --topk 4 --hidden 64
ARGS ?=
NAMED := $(or $(findstring --model,$(ARGS)),$(findstring --config,$(ARGS)),$(findstring --experts,$(ARGS)))

.PHONY: calibrate test lint contract contract-aiter faults mutants wheel format bench bench-gpu bench-amd clean

calibrate: $(VENV)/run.stamp
	$(BIN)/adaptive-moe calibrate --kernel cpu $(if $(NAMED),,$(SHAPE)) $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The plugins in the real engines' code, each in an environment of its own under .contract/.
contract: $(VENV)/dev.stamp
	$(BIN)/python tests/contract/run.py $(ARGS)

# What the wrapper relies on, against real AITER source: make contract-aiter AITER_SRC=path
contract-aiter: $(VENV)/dev.stamp
	$(BIN)/python tests/contract/check_aiter.py "$(AITER_SRC)" $(foreach ref,$(AITER_REFS),--ref $(ref))

# Crowds, kills, damaged files, full disks and lost ranks, with real processes: up to five minutes.
faults: $(VENV)/dev.stamp
	$(BIN)/python -m tests.faults --out calibration/results/faults.json $(ARGS)

# A thermometer: small changes of the deciding code that no test notices. ARGS='"adaptive_moe.policy.table*"'
mutants: export OMP_NUM_THREADS := 1
mutants: $(VENV)/dev.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[mutants]"
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

# What pip install takes elsewhere: dist/adaptive_moe-*.whl. Needs no torch.
wheel:
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Figures that need no GPU; their JSON is committed. docs/benchmarks.md has the GPU ones.
RESULTS := calibration/results

bench: $(VENV)/dev.stamp
	$(BIN)/python -m calibration.decision --out $(RESULTS)/decision.json

# Those that need one, with the python that has torch and triton there: minutes.
GPU_PYTHON ?= python3

bench-gpu:
	$(GPU_PYTHON) -m calibration.step --seconds 0.1 --out $(RESULTS)/step.json
	$(GPU_PYTHON) -m calibration.sorts --seconds 0.05 --out $(RESULTS)/sorts.json \
		--against calibration/recorded/sort_implementations_h100.csv
	$(GPU_PYTHON) -m calibration.noise --repeats 5 --seconds 0.08 --out $(RESULTS)/noise.json
	$(GPU_PYTHON) -m calibration.startup --repeats 2 --out $(RESULTS)/startup.json
	$(GPU_PYTHON) -m calibration.hook --counts 64 --seconds 7 --out $(RESULTS)/hook.json

# One JSON file from an MI300X or MI355X to send back, with the python that has torch and AITER
# there. docs/bench-amd.md
bench-amd:
	$(GPU_PYTHON) -m calibration.bench_amd $(ARGS)

$(VENV)/run.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("adaptive_moe needs Python 3.10 or newer, and $(PYTHON) is older: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): torch is the large download"
	$(BIN)/pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --disable-pip-version-check -e ".[plot]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --disable-pip-version-check -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) .contract dist mutants
