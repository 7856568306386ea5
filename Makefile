# make test   the numerics, on this machine         make demo   train two small towers on real pairs
# make bench  our losses against their baselines    make lint   ruff and mypy       make asan   the C++ under sanitizers
# make train  the reference trainer (ARGS="--config configs/tiny-shapes.yaml", --dry-run prints what it would do)
# make gpu    on a machine with a GPU, with the packages it has: tests, sanitizer, benchmark, in 8 minutes
# make kernels  every GPU kernel compiled without a GPU and judged (ARGS="--arch 90": one architecture)
#
# PYTHON  interpreter that makes the environment (>= 3.10)
# VENV    the environment; VENV= (empty) installs into and uses PYTHON's own
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
STAMPS := build/stamps
else
RUN := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
endif
PIP := $(RUN) -m pip --disable-pip-version-check

.PHONY: test demo train bench lint asan gpu kernels oldest install clean
test: install
	$(RUN) -m pytest $(ARGS)

demo: install
	$(RUN) -m fastvlm_loss.demo $(ARGS)

train: install
	$(RUN) -m fastvlm_loss.trainer $(ARGS)

# make ablation-negatives, ablation-masking, ablation-weighting, ablation-real, ablation-shapes
ablation-%: install
	$(RUN) -m benchmarks.ablations $* $(ARGS)

bench: install
	$(RUN) -m benchmarks $(ARGS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# its own build folder; the package itself stays as it is
asan: install
	FASTVLM_LOSS_CPP=1 FASTVLM_LOSS_SANITIZE=1 $(RUN) setup.py -q build_ext --build-lib build/asan --build-temp build/asan/temp
	FASTVLM_LOSS_LIBRARY=build/asan/fastvlm_loss/_C.abi3.so ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(RUN) -m pytest tests/test_matrix.py tests/test_engine_cpp.py tests/test_sigmoid_cpp.py tests/test_clip_properties.py tests/test_negatives.py tests/test_negatives_law.py -k cpp $(ARGS)

# installs nothing that the machine has not: it makes no environment
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

# the interpreter tests again, on the oldest Triton that is supported
oldest: install
	$(PIP) install -q --no-deps --upgrade --target build/triton-3.6 "triton==3.6.*"
	PYTHONPATH=build/triton-3.6 $(RUN) -m pytest tests/test_kernels.py $(ARGS)

kernels: install
	$(RUN) -m tools.kernel_report --gate $(ARGS)

install: $(STAMPS)/package

$(STAMPS)/environment:
ifneq ($(strip $(VENV)),)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
endif
	mkdir -p $(STAMPS)
	touch $@

# torch first: the package builds against it, so that no second one is downloaded for the build
$(STAMPS)/dependencies: pyproject.toml | $(STAMPS)/environment
	$(PIP) install -q torch torchvision ninja wheel "setuptools>=77"
	$(PIP) install -q --no-build-isolation -e ".[test,dev]"
	touch $@

# and again, without the network, when the C++ changes
$(STAMPS)/package: setup.py $(wildcard csrc/*) $(STAMPS)/dependencies
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info fastvlm_loss/*.so $(STAMPS) $(VENV)
