# make moons   train the built-in moons, calibrate 10 steps, and say where the images are
# make test    run the tests
# make browser install Debian's Chromium, which tests/browser need
# make test-faults   the fault tests, with all their repeats
# make lint    ruff and mypy
# make bench   measure the project beside its peers; with the peer's training script: DIFFUSERS_REPO=path
# make bench-gpu   test and measure it on a GPU, in eight minutes
# make docs    build the documentation as a site in build/docs
# make demo    serve a web page for the moons; train them first if there are none
# make clean   remove everything the others made, except the runs
# Each does its own set-up in .venv the first time. It needs Python with venv, and make.

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# two set-ups in one environment at the same time would break it
.NOTPARALLEL:
.PHONY: moons test browser test-faults lint bench bench-gpu docs demo clean

moons: .venv/train.stamp
	$(BIN)/accelerate launch training/train.py
	$(BIN)/accelerate launch training/calibrate.py runs/moons --num_inference_steps 10 --num_images 64 --compare false
	@echo "The images are in runs/moons/samples."

# the tests of one file share what they need, so they stay together
test: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

browser:
	command -v chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }

test-faults: .venv/test.stamp
	DDPM_FAULTS=full $(BIN)/python -m pytest tests/faults

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/test.stamp
	$(BIN)/python benchmarks/bench.py

bench-gpu: .venv/test.stamp
	$(BIN)/python benchmarks/gpu.py

docs: .venv/docs.stamp
	$(BIN)/python docs/site/make_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file docs/site/mkdocs.yml
	@echo "The site is in build/docs."

demo: .venv/demo.stamp
	test -d runs/moons/pipeline || $(MAKE) moons
	$(BIN)/python -m ddpm_pipeline demo runs/moons/pipeline

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: the largest download, and nothing after it may choose another
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/train.stamp: .venv/torch.stamp setup.cfg pyproject.toml
	$(PIP) -e ".[train]"
	touch $@

.venv/docs.stamp: .venv/torch.stamp setup.cfg pyproject.toml
	$(PIP) -e ".[train,docs]"
	touch $@

.venv/demo.stamp: .venv/torch.stamp setup.cfg pyproject.toml
	$(PIP) -e ".[train,demo]"
	touch $@

.venv/test.stamp: .venv/torch.stamp setup.cfg pyproject.toml
	$(PIP) -e ".[train,eval,ode,demo,web,test]"
	touch $@
