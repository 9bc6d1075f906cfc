# make demo   sets up an environment, trains on toy scenes, writes runs/demo/
# make test   sets up an environment, runs the tests
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: demo test lint clean

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(VENV)/ready
	rm -rf runs/demo
	$(PY) train.py --data toy --variant tiny --out runs/demo
	$(PY) infer.py runs/demo/best.pt --data toy --split test
	@echo
	@echo "Look at runs/demo/samples.png and runs/demo/curves.png. Next, on your own pictures:"
	@echo "  $(PY) infer.py runs/demo/best.pt YOUR.tif --out runs/demo/maps"
	@echo "  $(PY) train.py --data folder --root YOUR_DATA --out runs/mine"

test: $(VENV)/ready
	$(PY) -m pytest

lint:
	ruff check .
	ruff format --check .

clean:
	rm -rf $(VENV)
