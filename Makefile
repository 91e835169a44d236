# make run HW=01 and make test do all of their own set-up; they need Python 3.10 or newer, and make.
HW ?=
LEVEL ?= boss
PYTHON ?= python3
PY := .venv/bin/python
ONE = $(if $(HW),$(HW),$(error say which homework: make $@ HW=01))

.PHONY: run test lint sync release ladder bench slides lab clean

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet uv && $(PY) -m uv pip install --quiet --compile-bytecode --requirement requirements.txt || \
		$(PY) -m pip install --quiet --requirement requirements.txt  # uv: 20 s, pip: 145 s
	touch $@

run: .venv/ready          ## one homework on its sample data, with a result page: make run HW=03 LEVEL=strong
	@$(PY) tests/tools/run.py $(ONE) $(LEVEL)

test: .venv/ready         ## everything, or one homework: make test HW=03
	@$(PY) -m pytest $(if $(HW),-k "hw$(HW) or HW$(HW)")

lint: .venv/ready         ## style, common cells, scripts against notebooks
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) tests/tools/sync.py --check

sync: .venv/ready         ## common cells and tables into the scripts, scripts into the notebooks
	@$(PY) -m ruff format --quiet . && $(PY) tests/tools/sync.py

release: .venv/ready      ## execute at boss on the sample and keep the outputs: make release HW=03
	@$(PY) tests/tools/release.py $(HW)

ladder: .venv/ready       ## four levels, three seeds, full sample -> tests/ladder.json and the tables
	@$(PY) tests/tools/ladder.py $(HW)

bench: .venv/ready        ## our way against the official sample's way -> tests/bench.json and the tables
	@$(PY) tests/tools/bench.py $(HW)

slides:                   ## slides/*.md -> slides/build/*.html, and *.pdf where a Chromium is found
	@slides/build.sh

lab: .venv/ready
	@$(PY) -m jupyter lab

clean:                    ## forget what was made; data/ and .venv stay
	rm -rf out slides/build .pytest_cache .ruff_cache
