# Every target makes .venv when it is absent, and again when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INTEGRATIONS := .venv-integrations
ARGS ?=
CORES := $(shell getconf _NPROCESSORS_ONLN)
WORKERS := $(shell echo $$(($(CORES) < 4 ? $(CORES) + 1 : 4)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test suite test-integrations docs wheel test-wheel lint style types format bench clean

help:
	@echo "make demo    few labels, many unlabelled images: a student from the cache against one on labels"
	@echo "make test    ruff, mypy and pytest (ARGS='-k replay' goes to pytest)"
	@echo "make test-integrations  other libraries' loops, in $(INTEGRATIONS)"
	@echo "make docs    the documentation site, in site/"
	@echo "make wheel   the wheel, in dist/"
	@echo "make test-wheel  the wheel, installed into an empty environment and used there"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff mend what it can"
	@echo "make bench   the scripts in benchmarks/ with --quick, but studies of accuracy (ARGS= for all of each)"
	@echo "make clean   remove what these made, .venv included"

$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV): a few minutes, once"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@$(PY) -m logitcache demo $(ARGS)

lint: style types

style: $(INSTALLED)
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .

types: $(INSTALLED)
	@$(PY) -m mypy --no-error-summary

# Some tests wait more than they compute, and mypy takes one core: together they keep all cores busy.
test: style
	@$(MAKE) --no-print-directory --jobs 2 --keep-going types suite

suite: $(INSTALLED)
	@$(PY) -m pytest --quiet --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# It sees what is in $(VENV) after what is its own: PyTorch, 6 GB, is installed once.
$(INTEGRATIONS)/.installed: $(INSTALLED)
	@echo "Installing into $(INTEGRATIONS): a few minutes, once"
	@test -x $(INTEGRATIONS)/bin/pip || $(PYTHON) -m venv $(INTEGRATIONS)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/$(VENV).pth"
	@$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lightning,accelerate,keras,timm,hf,wandb,trackio,mlflow,app,http]' 'jax>=0.4.30' 'pytest>=8.3' 'hypothesis>=6.120'
	@touch $@

test-integrations: $(INTEGRATIONS)/.installed
	@$(INTEGRATIONS)/bin/python -m pytest --quiet -m integration tests/integrations $(ARGS)

docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

wheel: $(INSTALLED)
	@rm -rf dist
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test-wheel: wheel
	@PYTHON=$(PYTHON) .ci/wheel

format: $(INSTALLED)
	@$(PY) -m ruff check --fix --quiet .
	@$(PY) -m ruff format --quiet .

# Without studies of accuracy, which take hours, other programs, or a data set, and without modules that scripts import.
STUDIES := losses compression views few_labels data_free cifar encoding_accuracy peers compare_checkouts
MODULES := scale_model fault_cases fault_kills
BENCHMARKS := $(filter-out benchmarks/_%.py $(patsubst %,benchmarks/%.py,$(STUDIES) $(MODULES)),$(wildcard benchmarks/*.py))

# A missed goal ends a script with code 1: the others run all the same.
bench: $(INSTALLED)
	@status=0; for script in $(BENCHMARKS); do \
		echo "== $$script"; started=$$(date +%s); \
		$(PY) $$script $(if $(filter file,$(origin ARGS)),--quick,$(ARGS)) || status=1; \
		echo "-- $$(($$(date +%s) - started)) s"; \
	done; exit $$status

clean:
	rm -rf $(VENV) $(INTEGRATIONS) site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -type d -name __pycache__ -not -path './.git/*' -exec rm -rf {} +
