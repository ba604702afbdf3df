# `make demo` and `make test` set up all they need, in .venv; nothing outside this folder is touched.
#
#   make demo      the main job on real images, to a table and a picture
#   make test      the tests              (make test ARGS="--runslow -k store")
#   make lint      ruff and mypy
#   make bench     the benchmarks; they print, and write nothing
#   make clean     removes .venv and what the tools cached
#
# PYTHON=/path/to/python3.12 chooses the interpreter, PIP_FLAGS is handed to pip (say, for another index).

SHELL := /bin/sh
PYTHON ?=
PIP_FLAGS ?=
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help demo test lint bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(RUN) -m examples.digits.run $(ARGS)

test: $(READY)
	@$(RUN) -m pytest $(ARGS)

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

bench: $(READY)
	@for script in benchmarks/[a-z]*.py; do \
	    [ -e "$$script" ] || continue; \
	    echo "== $$script"; $(RUN) "$$script" $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The newest Python that can make an environment; where one lacks venv, the Debian or Ubuntu package that brings it.
$(READY): setup.py constraints.txt
	@set -eu; \
	fits='import sys; sys.exit(sys.version_info < (3, 11))'; \
	python=; short=; \
	for name in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3); do \
	    "$$name" -c "$$fits" 2>/dev/null || continue; \
	    if "$$name" -c 'import venv, ensurepip' 2>/dev/null; then python=$$name; break; fi; \
	    short=$${short:-$$name}; \
	done; \
	if [ -z "$$python" ] && [ -n "$$short" ]; then \
	    package=$$("$$short" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    case $$short in python3) package=python3-venv;; esac; \
	    echo "$$short cannot make a virtual environment yet. Please run (as root), then make again:" >&2; \
	    echo "    apt-get install $$package" >&2; exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or newer was not found. Please run (as root), then make again:" >&2; \
	    echo "    apt-get install python3 python3-venv" >&2; \
	    echo "or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$($$python --version); once, some minutes, torch is the large part of it."; \
	if ! $(RUN) -c "$$fits" 2>/dev/null; then rm -rf $(VENV); "$$python" -m venv $(VENV); fi; \
	$(RUN) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	    --config-settings editable_mode=compat -e '.[lint,test]'; \
	touch $(READY)
