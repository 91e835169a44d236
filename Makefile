# make run HW=01 and make test do all of their own set-up; they need Python 3.10 or newer, and make.
HW ?=
PYTHON ?= python3
PY := .venv/bin/python
ONE = $(if $(HW),$(HW),$(error say which homework: make $@ HW=01))
# what was given on make's command line, for the notebook: make run HW=03 LEVEL=strong WITHOUT=dropout
GIVEN = $(foreach name,LEVEL WITHOUT DATA PROFILE SEED DATA_DIR OUT_DIR RESUME SUBMIT,$(if \
	$(filter command,$(origin $(name))),HW_$(name)='$($(name))'))

.PHONY: help run test lint sync release ladder bench shape mutants slides lab clean

help:                     ## these lines
	@sed -n 's/^\([a-z]*\):[^#]*##/make \1\t/p' Makefile | expand -t 16

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || \
		{ echo "Python cannot make .venv (see above); on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet uv && $(PY) -m uv pip install --quiet --compile-bytecode --requirement requirements.txt || \
		$(PY) -m pip install --quiet --requirement requirements.txt  # uv: 20 s, pip: 145 s
	@touch $@

run: .venv/ready          ## one homework on its sample data, with a page: make run HW=03 LEVEL=strong SEED=7
	@env $(GIVEN) $(PY) tests/tools/run.py $(ONE)

test: .venv/ready         ## everything, or one homework: make test HW=03
	@$(PY) -m pytest -n 2 --dist loadgroup -p no:cacheprovider $(if $(HW),-k "HW$(HW)")

lint: .venv/ready         ## style, common cells, scripts against notebooks, budgets
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) tests/tools/sync.py --check $(HW)
	@$(PY) tests/tools/shape.py --summary $(HW)

sync: .venv/ready         ## common cells and numbers into the scripts, scripts into the notebooks
	@$(PY) -m ruff format --quiet $(if $(HW),HW$(HW),.) && $(PY) tests/tools/sync.py $(HW)

release: .venv/ready      ## execute at boss on the sample and keep the outputs: make release HW=03
	@$(PY) tests/tools/release.py $(HW)

ladder: .venv/ready       ## four levels, three seeds, boss without each idea -> tests/ladder.json (FRESH=1: anew)
	@$(PY) tests/tools/ladder.py $(HW)

bench: .venv/ready        ## our way against the official sample's way -> tests/bench.json
	@$(PY) tests/tools/bench.py $(HW)

shape: .venv/ready        ## how long each notebook is, beside its budget
	@$(PY) tests/tools/shape.py $(HW)

mutants: .venv/ready      ## do the tests notice mistakes? HW=03, or HW=common
	@$(PY) tests/tools/mutants.py $(HW)

slides:                   ## slides/*.md -> slides/build/*.html, and *.pdf where a Chromium is found
	@slides/build.sh

lab: .venv/ready          ## JupyterLab
	@$(PY) -m jupyter lab

clean:                    ## forget what was made; data/ and .venv stay
	rm -rf out slides/build .pytest_cache .ruff_cache
