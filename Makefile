# make serve    the environment, the default model, a server on 127.0.0.1:30000
# make test     formatting, lint, types, tests: what CI runs
VENV   := .venv
PYTHON := $(VENV)/bin/python
UV     := PATH="$(CURDIR)/.tools/bin:$$PATH" PYTHONPATH="$(CURDIR)/.tools:$$PYTHONPATH" uv
MODEL  ?= default
PACKAGE_INPUTS := python/pyproject.toml python/constraints.txt

.PHONY: serve test check format env env-dev clean

serve: env
	$(PYTHON) -m sgl_jax.launch_server --model-path $(MODEL) $(ARGS)

test: check
	$(PYTHON) -m pytest $(TESTS)

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

clean:
	rm -rf $(VENV) .tools
