# From a Mondrian tree to an evaluated LoRA adapter. `make help` lists targets and variables.

ADVISOR      ?= ansel#                        the advisor whose voice is learnt
MONDRIAN     ?= .#                            folder that holds mondrian.db, source/ and analysis_md/
DB           ?= $(MONDRIAN)#                  the database, or a folder with the databases of one installation
BASE_MODEL   ?= Qwen/Qwen3-VL-4B-Instruct#    hub id or folder of the base model
WORK         ?= .#                            folder that receives training_data/, models/ and evaluation/
LINK_ARGS    ?=#                              more options for link_training_data.py
PREPARE_ARGS ?=#                              more options for prepare_training_data.py
TRAIN_ARGS   ?=#                              more options for train_mlx_lora.py, e.g. "--epochs 5"
EVAL_ARGS    ?=#                              more options for evaluate_lora.py
VERSION      ?=#                              version for make promote: v1, v2, ...
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
# MLX's CPU wheel brings slow reference BLAS: Debian's libopenblas0-pthread comes before it where it is there, else the
# OpenBLAS of OpenCV's wheel (common/blas.py); both make float32 products 20 times faster
BLAS   := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib64/libopenblasp.so.0))
RUN    := $(if $(BLAS),LD_PRELOAD=$(BLAS)) $(VENV)/bin/python
LAUNCH := $(if $(HOSTS),$(VENV)/bin/mlx.launch --hostfile "$(HOSTS)" -- $(CURDIR)/$(VENV)/bin/python,$(RUN))

DATA     := $(WORK)/training_data
ADAPTER  := $(WORK)/models/qwen3-vl-4b-lora-$(ADVISOR)
MANIFEST := $(DATA)/training_data_manifest.jsonl
TRAIN    := $(DATA)/training_data_$(ADVISOR)_train.jsonl
VAL      := $(DATA)/training_data_$(ADVISOR)_val.jsonl
REPORT   := $(WORK)/evaluation/comparison_report.json
VERSIONS := --advisor "$(ADVISOR)" --work "$(WORK)"
TRAINING := --base_model "$(BASE_MODEL)" --train_data "$(TRAIN)" --val_data "$(VAL)" --output_dir "$(ADAPTER)"

DEMO   := demo
SAMPLE := $(wildcard tests/sample/*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup link prepare train plan eval iterate promote rollback versions demo test test-peft acceptance lint clean FORCE

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

eval: train ## compare base and tuned model on held-out photographs; fails unless every gate passes
	$(RUN) evaluate_lora.py --base_model "$(BASE_MODEL)" --lora_path "$(ADAPTER)" --val_data "$(VAL)" \
	  --output_report "$(REPORT)" $(EVAL_ARGS)

iterate: $(READY) ## train the next version, compare it with the one in use, promote it if every gate passes
	$(RUN) -m common.release.versions iterate $(VERSIONS) --mondrian "$(MONDRIAN)" --db_path "$(DB)" --base_model "$(BASE_MODEL)" \
	  --link_args="$(LINK_ARGS)" --prepare_args="$(PREPARE_ARGS)" --train_args="$(TRAIN_ARGS)" --eval_args="$(EVAL_ARGS)" $(if $(HOSTS),--hosts "$(HOSTS)")

promote: $(READY) ## put a version in use (VERSION=v2; default: the newest) if its report passes every gate
	$(RUN) -m common.release.versions promote $(VERSIONS) $(if $(VERSION),--version "$(VERSION)")

rollback: $(READY) ## put the version before the one in use in use again
	$(RUN) -m common.release.versions rollback $(VERSIONS)

versions: $(READY) ## table of the advisor's versions with their figures
	$(RUN) -m common.release.versions list $(VERSIONS)

demo: $(READY) $(DEMO)/base/model.safetensors ## the whole pipeline on a sample tree and a tiny Qwen3-VL, in minutes
	@$(MAKE) --no-print-directory train ADVISOR=ansel MONDRIAN=$(DEMO)/mondrian DB=$(DEMO)/mondrian WORK=$(DEMO) \
	  BASE_MODEL=$(DEMO)/base LINK_ARGS= PREPARE_ARGS= TRAIN_ARGS="--epochs 6 --learning_rate 3e-3"
	@rm -f $(DEMO)/evaluation/comparison_report.json
	@$(RUN) evaluate_lora.py --lora_path $(DEMO)/models/qwen3-vl-4b-lora-ansel \
	  --output_report $(DEMO)/evaluation/comparison_report.json || true
	@$(RUN) tests/sample/demo_result.py $(DEMO)/evaluation/comparison_report.json

$(DEMO)/mondrian/mondrian.db: $(SAMPLE) | $(READY)
	@$(RUN) tests/sample/make_tree.py --output_dir $(DEMO)/mondrian

# another base, another adapter
$(DEMO)/base/model.safetensors: $(DEMO)/mondrian/mondrian.db $(SAMPLE) | $(READY)
	@rm -rf $(DEMO)/models $(DEMO)/evaluation
	@$(RUN) tests/sample/make_tiny_model.py --output_dir $(DEMO)/base --pretrain_steps 540

test: $(READY) ## run the tests
	$(RUN) -m pytest

test-peft: $(READY) ## hold adapters against PEFT and transformers themselves, in .venv-peft (PyTorch)
	@test -x $(VENV)-peft/bin/python || $(PYTHON) -m venv $(VENV)-peft
	$(VENV)-peft/bin/pip install -q --disable-pip-version-check -r tests/peft/requirements.txt
	$(VENV)-peft/bin/python -m pytest --noconftest tests/peft

acceptance: $(READY) ## hold link and prepare against a real tree (MONDRIAN=...) by independent counts
	MONDRIAN="$(MONDRIAN)" $(RUN) -m pytest tests/acceptance

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
	$(VENV)/bin/pip install --no-compile --disable-pip-version-check --no-input --progress-bar off \
	  -r $(VENV)/requirements.txt -r requirements-dev.txt
	@$(VENV)/bin/python -m common.blas
# compiles the modules that the scripts import, a tenth of what pip would have
	@env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python evaluate_lora.py --help >/dev/null
	@touch $@

# A phase runs again when its input files or its own settings have changed; .settings files remember the latter.
$(call escape,$(DATA))/.link-settings: SETTINGS = $(ADVISOR) $(DB) $(MONDRIAN) $(LINK_ARGS)
$(call escape,$(DATA))/.prepare-settings: SETTINGS = $(ADVISOR) $(BASE_MODEL) $(PREPARE_ARGS)
$(call escape,$(DATA))/.train-$(ADVISOR)-settings: SETTINGS = $(BASE_MODEL) $(TRAIN_ARGS)
$(call escape,$(DATA))/.%-settings: FORCE
	@mkdir -p "$(DATA)"
	@printf '%s\n' '$(SETTINGS)' | cmp -s - "$@" || printf '%s\n' '$(SETTINGS)' > "$@"

# the -wal file is where a running service puts its newest jobs
$(call escape,$(MANIFEST)): $(call escape,$(DATA))/.link-settings $(wildcard $(call escape,$(DB))/*.db $(call escape,$(DB))/*.db-wal $(filter %.db,$(call escape,$(DB)))) | $(READY)
	$(RUN) link_training_data.py --advisor "$(ADVISOR)" --db_path "$(DB)" --source_dir "$(MONDRIAN)/source" \
	  --analysis_dir "$(MONDRIAN)/analysis_md" --output_dir "$(DATA)" $(LINK_ARGS)

$(call escape,$(TRAIN)): $(call escape,$(MANIFEST)) $(call escape,$(DATA))/.prepare-settings
	$(RUN) prepare_training_data.py --advisor "$(ADVISOR)" --manifest "$(MANIFEST)" --output_dir "$(DATA)" \
	  --base_model "$(BASE_MODEL)" $(PREPARE_ARGS)

# the trainer itself refuses to go on with other settings or data, and says which; --overwrite trains anew
$(call escape,$(ADAPTER))/.trained: $(call escape,$(TRAIN)) $(call escape,$(DATA))/.train-$(ADVISOR)-settings
	$(LAUNCH) train_mlx_lora.py $(TRAINING) --resume $(TRAIN_ARGS)
	@touch "$@"
