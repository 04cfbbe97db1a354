# Everything is set up below .venv/; nothing outside the checkout is touched. PYTHON=... chooses the interpreter.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
NOX := .venv/nox/bin/nox
SESSIONS := unit page browser keras keras_jax keras_torch keras_oldest keras2 tf_keras chainer chainer_mpi chainer_old chainer_new
JOBS ?= 2
BENCHMARKED := unit keras chainer

.DEFAULT_GOAL := help
.PHONY: help test demo lint page bench clinic clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

test: $(NOX) ## lint, then every test in its own environment; ends with one line of totals
	@rm -rf .venv/results && mkdir -p .venv/results
	@$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) $(addprefix session-,lint $(SESSIONS)); status=$$?; \
	.venv/nox/bin/python tests/summary.py .venv/results $(SESSIONS) || status=1; exit $$status

# A session's lines begin with its name: several run at once.
session-%:
	@{ PYTHONUNBUFFERED=1 $(NOX) --sessions $* 2>&1; echo $$? > .venv/results/$*.status; } | \
	while IFS= read -r line; do printf '%s: %s\n' '$*' "$$line"; done; \
	exit $$(cat .venv/results/$*.status)

# Built once, before the sessions that run at once all build it.
session-chainer session-chainer_old session-chainer_new: session-chainer_wheel
# It brings what the browser checks the page with.
session-browser: session-page

demo: $(NOX) ## train a broken network and its repaired twin, and watch bnwatch tell them apart
	@$(NOX) --sessions demo
	@.venv/demo/bin/bnwatch demo --log-dir runs/demo

lint: $(NOX) ## style, types, layers
	@$(NOX) --sessions lint

page: ## build bnwatch/dashboard/static/ from frontend/; needs Node
	@npm --prefix frontend ci --silent
	@npm --prefix frontend run --silent types
	@npm --prefix frontend run --silent build

bench: $(NOX) ## time the watch
	@$(NOX) --install-only --sessions $(BENCHMARKED)
	@$(NOX) --sessions bench

clinic: $(NOX) ## train what failed for real people, and count how often bnwatch names the cause
	@$(NOX) --install-only --sessions keras chainer
	@$(NOX) --sessions clinic

clean: ## remove .venv/
	rm -rf .venv

$(NOX): constraints/nox.txt
	@test -n "$(PYTHON)" || { echo "bnwatch needs Python 3.10 to 3.13; none was found, name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@rm -rf .venv/nox
	@$(PYTHON) -m venv .venv/nox
	@.venv/nox/bin/python -m pip install --quiet --disable-pip-version-check -r constraints/nox.txt
	@touch $@
