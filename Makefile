# From a Mondrian tree to an evaluated LoRA adapter. `make help` lists targets and variables.

ADVISOR      ?= ansel#                        the advisor whose analyses the adapter learns from
MONDRIAN     ?= .#                            folder that holds mondrian.db, source/ and analysis_md/
DB           ?= $(MONDRIAN)#                  the database, or a folder with the databases of one installation
BASE_MODEL   ?= Qwen/Qwen3-VL-4B-Instruct#    hub id or folder of the base model
WORK         ?= .#                            folder that receives training_data/, models/ and evaluation/
LINK_ARGS    ?=#                              more options for link_training_data.py
PREPARE_ARGS ?=#                              more options for prepare_training_data.py
TRAIN_ARGS   ?=#                              more options for train_mlx_lora.py, e.g. "--epochs 5"
EVAL_ARGS    ?=#                              more options for evaluate_lora.py
VERSION      ?=#                              for promote and eval: v1, v2, ...; for try: v1,v2
PHOTO        ?=#                              for try: a photograph, or several separated by spaces
STRICT       ?=#                              1: for eval, promote and iterate: likely is not enough
JSON         ?=#                              1: make versions prints JSON
HOSTS        ?=#                              hostfile of mlx.launch: train on several machines or GPUs
BACKEND      ?=#                              Linux: cpu, cuda12 or cuda13; empty: as set up before, else cpu
PYTHON       ?= python3#                      the Python (3.11 or newer) that .venv is made with

empty  :=
space  := $(empty) $(empty)
escape  = $(subst $(space),\$(space),$(1))

VENV   := .venv
# a machine that was set up for CUDA stays so without naming it again
BUILD  := $(or $(BACKEND),$(patsubst $(VENV)/.ready-%,%,$(firstword $(wildcard $(VENV)/.ready-*))),cpu)
READY  := $(VENV)/.ready-$(BUILD)
RUN    := $(VENV)/bin/python
LAUNCH := $(if $(HOSTS),$(VENV)/bin/mlx.launch --hostfile "$(HOSTS)" -- "$(CURDIR)/$(VENV)/bin/python",$(RUN))

# each advisor has its own files, so that two may share one WORK
DATA     := $(WORK)/training_data
ADAPTER  := $(WORK)/models/qwen3-vl-4b-lora-$(ADVISOR)
EVALUATED := $(ADAPTER)$(addprefix -,$(filter-out v1,$(VERSION)))
# the base that an adapter was trained on is recorded with it; another is taken only where it is named
OWN_BASE := $(if $(filter-out file default,$(origin BASE_MODEL)),--base_model "$(BASE_MODEL)")
MANIFEST := $(DATA)/training_data_$(ADVISOR)_manifest.jsonl
TRAIN    := $(DATA)/training_data_$(ADVISOR)_train.jsonl
VAL      := $(DATA)/training_data_$(ADVISOR)_val.jsonl
REPORT   := $(WORK)/evaluation/$(ADVISOR)/comparison_report.json
VERSIONS := --advisor "$(ADVISOR)" --work "$(WORK)"
TRAINING := --base_model "$(BASE_MODEL)" --train_data "$(TRAIN)" --val_data "$(VAL)" --output_dir "$(ADAPTER)"

# 3 and 4 are verdicts of an evaluation that has finished, and has said so: no error of make's
DECIDED := { code=$$?; test $$code -eq 3 || test $$code -eq 4 || exit $$code; }

# the variables that were given, checked, and as the scripts repeat them in the next command that they print
NAMES := ADVISOR MONDRIAN DB BASE_MODEL WORK LINK_ARGS PREPARE_ARGS TRAIN_ARGS EVAL_ARGS VERSION PHOTO STRICT JSON HOSTS BACKEND PYTHON
GIVEN := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v))
$(foreach v,$(filter-out $(NAMES) MAKE% MFLAGS,$(GIVEN)),$(error unknown variable $v; those that make takes: $(NAMES)))
quoted = $(if $(findstring $(space),$($1)),"$($1)",$($1))
export MONDRIAN_MAKE_VARIABLES := $(strip $(foreach v,$(filter $(GIVEN),$(filter-out VERSION PHOTO STRICT JSON PYTHON,$(NAMES))),$v=$(call quoted,$v)))

DEMO   := demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup link prepare train plan eval try iterate promote rollback versions demo bench test test-pages test-peft acceptance lint clean FORCE

help: ## this list
	@echo "make TARGET [VARIABLE=value ...]"; echo; echo "Targets"
	@awk -F':.*## ' '/^[a-z][a-z-]*:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo; echo "Variables and their defaults"
	@awk -F'\\?= *|# *' '/^[A-Z_]+ *\?=/{printf "  %-12s %s%s\n", $$1, $$3, $$2 == "" ? "" : " [" $$2 "]"}' Makefile

setup: $(READY) ## make .venv with everything the scripts need (BACKEND=cuda13 for NVIDIA GPUs)

link: $(call escape,$(MANIFEST)) ## find the advisor's analyses and their photographs in the database

prepare: $(call escape,$(TRAIN)) ## turn them into train and validation data without leaks

train: $(call escape,$(ADAPTER))/.trained ## train the LoRA adapter; does nothing when it is up to date

plan: $(READY) $(call escape,$(TRAIN)) ## estimate memory, time and adapter size without training
	$(RUN) train_mlx_lora.py $(TRAINING) $(TRAIN_ARGS) --plan

# judges the adapter that is there, on the data recorded with it; trains only where there is none
eval: $(READY) $(if $(VERSION)$(wildcard $(call escape,$(ADAPTER))/.trained),,train) ## compare base and tuned model on held-out photographs (VERSION=v2 for another version)
	@$(RUN) evaluate_lora.py --lora_path "$(EVALUATED)" $(OWN_BASE) --output_report "$(REPORT)" $(if $(STRICT),--strict) $(EVAL_ARGS) || $(DECIDED)

try: $(READY) ## base and tuned answers to PHOTO=me.jpg side by side, and a page with both
	$(if $(PHOTO),,$(error make try needs a photograph: make try PHOTO=me.jpg))
	@$(RUN) evaluate_lora.py $(if $(wildcard $(call escape,$(PHOTO))),--photo "$(PHOTO)",$(foreach p,$(PHOTO),--photo "$p")) \
	  --lora_path "$(WORK)/models" --advisor "$(ADVISOR)" $(OWN_BASE) --output_report "$(REPORT)" \
	  $(if $(VERSION),--versions "$(VERSION)") $(EVAL_ARGS)

iterate: $(READY) ## train the next version, compare it with the one in use, promote it if every gate passes
	@$(RUN) -m common.release.versions iterate $(VERSIONS) --mondrian "$(MONDRIAN)" --db_path "$(DB)" --base_model "$(BASE_MODEL)" \
	  --link_args="$(LINK_ARGS)" --prepare_args="$(PREPARE_ARGS)" --train_args="$(TRAIN_ARGS)" --eval_args="$(EVAL_ARGS)" $(if $(HOSTS),--hosts "$(HOSTS)") $(if $(STRICT),--strict) || $(DECIDED)

promote: $(READY) ## put a version in use (VERSION=v2; default: the newest) if its report passes every gate
	$(RUN) -m common.release.versions promote $(VERSIONS) $(if $(VERSION),--version "$(VERSION)") $(if $(STRICT),--strict)

rollback: $(READY) ## put the version before the one in use in use again
	$(RUN) -m common.release.versions rollback $(VERSIONS)

versions: $(READY) ## table of the advisor's versions with their figures
	$(RUN) -m common.release.versions list $(VERSIONS) $(if $(JSON),--json)

demo: $(READY) ## the whole pipeline on a sample tree and a tiny Qwen3-VL, in minutes
	@$(RUN) tests/sample/demo.py --folder $(DEMO)

bench: $(READY) ## what this machine needs for 100 photographs, as rows of README's table
	@$(RUN) tests/benchmarks/bench_machine.py

test: $(READY) ## run the tests
	$(RUN) -m pytest

test-pages: $(READY) ## check the pages in Chromium: weight, headings, contrast (installs axe-core by npm)
	@npm install --silent --no-fund --no-audit --prefix tests/pages
	$(RUN) -m pytest tests/pages

test-peft: $(READY) ## compare adapters with PEFT and transformers, in their own environment .venv-peft (PyTorch)
	@test -x $(VENV)-peft/bin/python || $(PYTHON) -m venv $(VENV)-peft
	$(VENV)-peft/bin/pip install -q --disable-pip-version-check -r tests/peft/requirements.txt
	$(VENV)-peft/bin/python -m pytest --noconftest tests/peft

acceptance: $(READY) ## check link and prepare on a real tree (MONDRIAN=...), and tokens where BASE_MODEL is a folder
	@MONDRIAN="$(MONDRIAN)" QWEN3_VL="$(BASE_MODEL)" $(RUN) -m pytest tests/acceptance/test_real_tree.py \
	  $(if $(wildcard $(call escape,$(BASE_MODEL))/tokenizer_config.json),tests/acceptance/test_real_tokenizer.py)

lint: $(READY) ## check style and formatting with ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean: ## remove the demo and the virtual environment, never data or adapters
	rm -rf $(DEMO) $(VENV) $(VENV)-peft

# mlx[cpu] and mlx[cudaNN] bring the same library file, so a change of backend removes the other first
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@echo "Installing into $(VENV) (about two minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@ls $(VENV)/.ready-* >/dev/null 2>&1 && test ! -e $@ && \
	  $(VENV)/bin/pip uninstall -q -y mlx mlx-cpu mlx-cuda-12 mlx-cuda-13 || true
	@rm -f $(VENV)/.ready-*
	@sed 's/mlx\[cpu\]/mlx[$(BUILD)]/' requirements.txt > $(VENV)/requirements.txt
	@$(VENV)/bin/pip install -qq --no-compile --disable-pip-version-check --no-input --progress-bar off \
	  -r $(VENV)/requirements.txt -r requirements-dev.txt
# mlx-vlm brings the OpenCV that draws windows: a server without libGL takes the one that does not
	@$(VENV)/bin/python -c 'import cv2' 2>/dev/null || { version=$$($(VENV)/bin/pip freeze | sed -n 's/^opencv-python==//p'); \
	  $(VENV)/bin/pip uninstall -q -y opencv-python && \
	  $(VENV)/bin/pip install -qq --no-deps --disable-pip-version-check --no-input "opencv-python-headless==$$version"; }
	@$(VENV)/bin/python -m common.model.blas
# compiles the modules that the scripts import, a tenth of what pip would have
	@env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python evaluate_lora.py --help >/dev/null
	@touch $@

# A phase runs again when its input files or its own settings have changed; .settings files remember the latter.
$(call escape,$(DATA)/.link-$(ADVISOR)-settings): SETTINGS = $(DB) $(MONDRIAN) $(LINK_ARGS)
$(call escape,$(DATA)/.prepare-$(ADVISOR)-settings): SETTINGS = $(BASE_MODEL) $(PREPARE_ARGS)
$(call escape,$(DATA)/.train-$(ADVISOR)-settings): SETTINGS = $(BASE_MODEL) $(TRAIN_ARGS)
$(call escape,$(DATA))/.%-settings: FORCE
	@mkdir -p "$(DATA)"
	@printf '%s\n' '$(subst ','\'',$(SETTINGS))' | cmp -s - "$@" || printf '%s\n' '$(subst ','\'',$(SETTINGS))' > "$@"

# the -wal file is where a running service puts its newest jobs
DATABASES := $(shell ls -d "$(DB)" "$(DB)"-wal "$(DB)"/*.db "$(DB)"/*.db-wal 2>/dev/null | grep -E '[.]db(-wal)?$$' | sed 's/ /\\ /g')
$(call escape,$(MANIFEST)): $(call escape,$(DATA)/.link-$(ADVISOR)-settings) $(DATABASES) | $(READY)
	$(RUN) link_training_data.py --advisor "$(ADVISOR)" --db_path "$(DB)" --source_dir "$(MONDRIAN)/source" \
	  --analysis_dir "$(MONDRIAN)/analysis_md" --output_dir "$(DATA)" \
	  --output_file "training_data_$(ADVISOR)_manifest.jsonl" $(LINK_ARGS)

$(call escape,$(TRAIN)): $(call escape,$(MANIFEST)) $(call escape,$(DATA)/.prepare-$(ADVISOR)-settings)
	$(RUN) prepare_training_data.py --advisor "$(ADVISOR)" --manifest "$(MANIFEST)" --output_dir "$(DATA)" \
	  --base_model "$(BASE_MODEL)" $(PREPARE_ARGS)

# The trainer refuses to continue with other settings or data, and says which; --overwrite trains again. It writes the
# target itself when it has finished: mlx.launch ends with 0 even when a process was killed.
$(call escape,$(ADAPTER))/.trained: $(call escape,$(TRAIN)) $(call escape,$(DATA)/.train-$(ADVISOR)-settings)
	$(LAUNCH) train_mlx_lora.py $(TRAINING) --resume $(TRAIN_ARGS)
	@test -f "$@" || { echo "Training did not finish; the same make command continues it."; exit 1; }
