# Every target makes its own .venv first; nothing outside this folder is changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Without an NVIDIA GPU the CPU build of torch is enough, and several gigabytes smaller.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
CONSTRAINTS := $(if $(GPU),,-c constraints-cpu.txt)

.PHONY: help demo test lint wheel clean

help:
	@echo "make demo   export the embedded example and measure it"
	@echo "make test   lint, types and tests"
	@echo "make lint   lint and types only"
	@echo "make test-runtimes  files of every format on the oldest ONNX Runtime and on today's"
	@echo "make modelopt  an environment for nvidia-modelopt, which can be compared against"
	@echo "make openvino  an environment for ONNX Runtime with another provider, which tests measure by"
	@echo "make wheel  build dist/*.whl"
	@echo "make clean  remove what was made here, the environment included"

# Made anew when what is installed has changed; the code itself is installed in place.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	rm -rf out/demo
	$(BIN)/hirelc-deploy demo --out out/demo

# nvidia-modelopt, which is compared against, may bring other versions of everything: it has an environment of its own,
# which reads torch from the first one and cannot change it.  Tests that need it are left out where it cannot be made.
MODELOPT := .venv-modelopt
.PHONY: modelopt
modelopt: $(MODELOPT)/.installed

$(MODELOPT)/.installed: | $(VENV)/.installed
	$(BIN)/python -m venv --clear $(MODELOPT)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(MODELOPT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(MODELOPT)/bin/python -m pip install --quiet $(CONSTRAINTS) 'nvidia-modelopt==0.47.0' huggingface-hub requests \
		onnx-graphsurgeon onnxslim lief polygraphy
	touch $@

# ONNX Runtime's builds for other providers take the place of the one that is used here: an environment of its own, too.
OPENVINO := .venv-openvino
.PHONY: openvino
openvino: $(OPENVINO)/.installed

$(OPENVINO)/.installed: | $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(OPENVINO)
	$(BIN)/python -m pip --python $(OPENVINO) install --quiet --no-deps 'onnxruntime-openvino==1.24.1' numpy
	touch $@

# One thread a worker: two workers that take all cores each only wait for one another.
test: lint
	-$(MAKE) modelopt
	-$(MAKE) openvino
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# mypy knows nothing of setuptools' package-dir, so it is shown the packages where they are installed.
TYPED := build/typed/hirelc_deploy
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/hirelc_deploy/* $(CURDIR)/exporters $(CURDIR)/kernels $(CURDIR)/profiles $(TYPED)
	cd $(dir $(TYPED)) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package hirelc_deploy

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) $(OLDEST) $(MODELOPT) $(OPENVINO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Files of every number format on the oldest ONNX Runtime that the profiles promise, and on today's.
# The last Python that it has wheels for is 3.11; its own dependencies are for tools that are not used.
OLDEST_RUNTIME := 1.16.3
OLDEST_PYTHON ?= python3.11
OLDEST := .venv-oldest

$(OLDEST)/.installed-$(OLDEST_RUNTIME): | $(VENV)/.installed
	$(OLDEST_PYTHON) -m venv --clear --without-pip $(OLDEST)
	$(BIN)/python -m pip --python $(OLDEST) install --quiet --no-deps onnxruntime==$(OLDEST_RUNTIME) 'numpy<2'
	touch $@

.PHONY: test-runtimes
test-runtimes: $(VENV)/.installed $(OLDEST)/.installed-$(OLDEST_RUNTIME)
	rm -rf build/runtimes
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/runtimes/write.py build/runtimes
	$(BIN)/python tests/runtimes/check.py build/runtimes
	$(OLDEST)/bin/python tests/runtimes/check.py build/runtimes
