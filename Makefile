# Two commands do everything on a fresh machine: `make tables` and `make test`.
PRESET ?= laptop
COHORT ?= phantom
OUT ?= out
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Set TORCH_INDEX to PyTorch's CPU index (named on its install page) where pip's own index only has CUDA builds.
TORCH_INDEX ?=
export OMP_NUM_THREADS ?= 1
# The page keeps its parameters, and a clinic's folder may name a patient: so the page is given the variable, not the path.
export RADREPRO_DATA_DIR = $(DATA_DIR)

.PHONY: tables figures test bench lessons readme clean
.DELETE_ON_ERROR:

tables: $(VENV)/ready
	@mkdir -p $(OUT)
	@$(BIN)/papermill nbs/tables.ipynb $(OUT)/tables.ipynb --no-progress-bar -p preset $(PRESET) -p cohort $(COHORT) \
	  -p out_dir $(OUT) $(if $(DATA_DIR),-p data_dir '$$RADREPRO_DATA_DIR') $(if $(SEEDS),-p seeds $(SEEDS)) $(if $(DEVICE),-p device $(DEVICE)) \
	  $(if $(SOURCE),-p source $(SOURCE))
	@$(BIN)/jupyter nbconvert --log-level ERROR --no-input --to html $(OUT)/tables.ipynb
	@echo "tables: $(OUT)/tables.html  $(OUT)/tables.ipynb  $(OUT)/tables/*.csv"
	@cat $(OUT)/tables/headline.txt

figures: $(VENV)/ready-dev
	@mkdir -p $(OUT)
	@$(BIN)/papermill nbs/figures.ipynb $(OUT)/figures.ipynb --no-progress-bar -p preset $(PRESET) -p cohort $(COHORT) \
	  -p out_dir $(OUT) $(if $(DATA_DIR),-p data_dir '$$RADREPRO_DATA_DIR') $(if $(SEEDS),-p seeds $(SEEDS)) $(if $(DEVICE),-p device $(DEVICE)) \
	  $(if $(PATIENT),-p patient $(PATIENT))
	@$(BIN)/jupyter nbconvert --log-level ERROR --no-input --to html $(OUT)/figures.ipynb
	@echo "figures: $(OUT)/figures.html  $(OUT)/figures/*.html  *.png  *.csv"

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=90

bench: $(VENV)/ready-dev
	@for script in $(if $(ONLY),benchmarks/$(ONLY).py,$(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py))); do \
	  $(BIN)/python $$script || exit 1; done

# The lessons with their outputs: each picture as Plotly to touch and as PNG for pages that show none. Needs Chrome or Chromium.
lessons: $(VENV)/ready-dev
	PLOTLY_RENDERER=plotly_mimetype+png $(BIN)/jupyter nbconvert --log-level ERROR --execute --inplace $(or $(ONLY),$(wildcard nbs/*/[0-9]*.ipynb))
	$(BIN)/python scripts/shrink_pictures.py $(or $(ONLY),$(wildcard nbs/*/[0-9]*.ipynb))
	$(BIN)/nbdev_clean

# README.md is nbs/index.ipynb, executed.
readme: $(VENV)/ready-dev
	$(BIN)/jupyter nbconvert --log-level ERROR --execute --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags hide_input nbs/index.ipynb --output-dir . --output README

# What the tables need. torch first: any other request would bring another build of it. pyRadPlan last and alone: its metadata ask
# for a dozen language-model SDKs that it never imports; what it needs is the extra `dose`.
$(VENV)/ready: constraints.txt settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dose]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^pyRadPlan==' constraints.txt)
	touch $@

# What tests, benchmarks, lessons and pictures as PNG need too.
$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,dose]'
	touch $@

clean:
	rm -rf $(OUT)
