# make demo   sets up an environment, trains on toy scenes, writes runs/demo/
# make test   sets up an environment, runs the tests
# make lint   sets up an environment, checks style and format
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
DEMO   := runs/demo
RUFF   := 0.17.6

.PHONY: demo test lint clean

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# A finished demo starts again. One that was interrupted goes on.
demo: $(VENV)/ready
	if [ -e $(DEMO)/config.json ] && [ ! -e $(DEMO)/metrics.json ]; then resume=--resume; else rm -rf $(DEMO); fi; \
	$(PY) train.py --data toy --variant tiny --out $(DEMO) $$resume
	$(PY) infer.py $(DEMO)/best.pt --data toy --split test
	@echo
	@echo "Look at samples.png, curves.png and story.png (who taught whom) in $(DEMO). Next, on your own pictures:"
	@echo "  $(PY) infer.py $(DEMO)/best.pt YOUR.tif --out $(DEMO)/maps"
	@echo "  $(PY) train.py --data folder --root YOUR_DATA --steps 4000 --out runs/mine"

# Two halves side by side, a thread each; the report of the second follows that of the first.
HALF := tests/kernels tests/experiments tests/test_notebooks.py
test: $(VENV)/ready
	@export OMP_NUM_THREADS=1; report=$$(mktemp); \
	$(PY) -m pytest $(HALF:%=--ignore=%) > $$report 2>&1 & others=$$!; \
	trap 'kill $$others' INT TERM; \
	$(PY) -m pytest $(HALF); failed=$$?; \
	wait $$others || failed=1; cat $$report; rm -f $$report; exit $$failed

$(VENV)/bin/ruff: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check ruff==$(RUFF)

lint: $(VENV)/bin/ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV)
