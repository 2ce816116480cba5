# Everything a fresh machine needs: Python >= 3.11, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard pyproject.toml dotresize_fx/*.py dotresize_fx/*/*.py dotresize_fx/*/*.j2 passes/*.py export/*.py)

.PHONY: demo test check clean

# torch goes first: pinned, before anything that depends on it can pull another build.
$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt '.[cpu,test,check]'
	touch $@

# A plain install, not an editable one: mypy finds the mapped folders only so, and not from here, where the core alone is.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
	touch $@

demo: $(VENV)/installed
	$(BIN)/dotresize-fx export smollm2-135m demo --ratio 0.2 --force

# A process a core, one thread each: tracing, which takes most of the time, uses one core however many there are.
# worksteal keeps tests of one file together as long as it can: they share models and captures.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p dotresize_fx

clean:
	rm -rf $(VENV) build demo *.egg-info
