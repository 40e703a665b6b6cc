# make setup   a virtual environment with everything, CPU build of torch, pinned
# make demo    the whole job at tiny scale: data, VAE, curriculum, samples, report
# make demo-full  the same with fine-tuning, image to video, portraits and distillation, every stage sampled
# make test    the tests that need no GPU
# make test-all   the same, the slowest also with further layouts and values
# make chaos   half an hour of real runs with every fault, and what each of them cost
# make bench-gpu  every figure of one GPU, a JSON line each (docs/performance.md)
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
# The demo and the tests start hundreds of processes: each would compile our own files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-full test test-all chaos lint types arch test-gpu docs ci bench-all bench-gpu

setup: $(STAMP)

# torch goes first and alone: asked for by another package, pip would fetch the CUDA build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[test,docs]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/hunyuan-train demo run.dir=runs/demo $(ARGS)

demo-full: $(STAMP)
	$(BIN)/hunyuan-train demo recipe=demo_full run.dir=runs/demo-full $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not multigpu and not chaos and not again" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not multigpu and not chaos" $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m pytest -q -s -m chaos tests/resilience $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m "gpu or multigpu" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

arch: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/architecture

docs: $(STAMP)
	$(BIN)/sphinx-build -q -W docs docs/_build/html

bench-%: $(STAMP)
	$(BIN)/python benchmarks/$*.py $(ARGS)

bench-all: $(patsubst benchmarks/%.py,bench-%,$(wildcard benchmarks/[a-z]*.py))

# One after the other: they share the GPU. A failure does not keep the others from running.
bench-gpu: $(STAMP)
	@failed=; for name in attention blocks kernels offload planner_error one_gpu; do \
		$(BIN)/python benchmarks/$$name.py $(ARGS) || failed="$$failed $$name"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

ci:
	bash .ci/run
