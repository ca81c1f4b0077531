# Two commands do everything on a fresh machine with Python and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
# One thread per test process: the models are small, and the processes share the cores.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

.PHONY: demo test fuzz lint bench experiments peers site serve clean

demo: $(VENV)/demo
	$(RUN) -m dag_hesse.experiments digits --out demo-report

test: $(VENV)/test lint
	$(TEST)

fuzz: $(VENV)/test
	DAG_HESSE_FUZZ=$(or $(EXAMPLES),5000) $(TEST) tests/property

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: peers
	$(RUN) -m bench analyze
	$(RUN) -m bench hvp
	$(RUN) -m bench memory
	$(RUN) -m bench scaling
	$(RUN) -m bench profile

experiments: $(VENV)/demo
	$(RUN) -m dag_hesse experiment exp1 exp1b exp2 exp3 exp3b exp4 exp5 exp6 ablation

# The documentation, as pages in site/; `make serve` shows them while they are edited.
site: $(VENV)/docs
	$(RUN) -m mkdocs build --strict

serve: $(VENV)/docs
	$(RUN) -m mkdocs serve

# torch is taken from the machine where it has one (the environment sees the system's packages), else pinned.
$(VENV)/bin/python:
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet "$(TORCH)"

$(VENV)/demo: pyproject.toml setup.py csrc/reachability.cpp | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/test: pyproject.toml setup.py csrc/reachability.cpp bench/peers.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[test,lint]"
	$(RUN) -m pip install --quiet --no-deps --requirement bench/peers.txt
	touch $@

$(VENV)/docs: pyproject.toml setup.py csrc/reachability.cpp | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@

# What the benchmark compares with: the test environment has all but JAX.
peers: $(VENV)/test
	$(RUN) -m pip install --quiet jax

clean:
	rm -rf $(VENV) build site *.egg-info dag_hesse/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
