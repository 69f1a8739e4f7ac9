SHELL := bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
REQUIREMENTS ?= cpu
TTNN_PYTHON ?=
RUN := $(VENV)/bin/python

PORT ?= 30000
MODEL ?=
PREFILL ?= 1
DECODE ?= 1
ARGS ?=
PYTEST_ARGS ?=
SOAK ?= 50
DEMO_MODEL := build/demo-model
TASKS ?= last_words

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: ## Make or update .venv (VENV= REQUIREMENTS=cpu|cuda PYTHON=); the targets below do it themselves
	@VENV='$(VENV)' REQUIREMENTS='$(REQUIREMENTS)' PYTHON='$(PYTHON)' scripts/setup.sh

.PHONY: serve
serve: venv $(if $(MODEL),,demo-model) ## Serve MODEL=, or a demo model, on PORT=30000 with PREFILL=1 DECODE=1 servers; more flags in ARGS=
	@exec $(RUN) -m sglang_hma.launch_pd --model-path '$(or $(MODEL),$(DEMO_MODEL))' --port $(PORT) \
		--prefill $(PREFILL) --decode $(DECODE) --log-dir build/logs/$(PORT) $(ARGS)

.PHONY: demo-model
demo-model: venv ## A small model, fetched once (random where that fails), at build/demo-model
	@$(RUN) -m sglang_hma.demo_model $(DEMO_MODEL)

.PHONY: test
test: venv ## Lint, types and all tests; with PYTEST_ARGS= lint and those
ifeq ($(strip $(PYTEST_ARGS)),)
	@VENV='$(VENV)' scripts/test.sh
else
	@lint=0; $(MAKE) --no-print-directory lint || lint=$$?; \
	$(RUN) -m pytest $(PYTEST_ARGS) && exit $$lint
endif

.PHONY: test-gpu
test-gpu: venv ## On a machine with a GPU: the kernels' tests on it
	$(RUN) -m pytest test/gpu $(PYTEST_ARGS)

.PHONY: test-card
test-card: venv ## On a machine with a Tenstorrent card, or its simulator: the prefill runtime on it
	$(RUN) -m pytest -o timeout=0 -s test/device/test_card.py test/device/test_card_serves.py $(PYTEST_ARGS)

.PHONY: lint
lint: venv ## Check style, types and who imports whom
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

.PHONY: format
format: venv ## Fix style in place
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: bench-kernels
bench-kernels: venv ## Measure the CPU kernels beside torch, memcpy and (TTNN_PYTHON=) ttnn; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.kernels.codec --json build/bench/codec.json --plot build/bench/codec.svg \
		$(if $(TTNN_PYTHON),--ttnn-python '$(TTNN_PYTHON)') $(ARGS)
	$(RUN) -m benchmark.kernels.decode_attention --json build/bench/decode_attention.json \
		--plot build/bench/decode_attention.svg $(ARGS)

.PHONY: bench-gpu
bench-gpu: venv ## On a machine with a GPU: decode attention beside FlashInfer; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.kernels.decode_attention_gpu --json build/bench/decode_attention_gpu.json \
		--plot build/bench/decode_attention_gpu.svg $(ARGS)

.PHONY: bench-transfer
bench-transfer: venv ## Measure TTFT over a slow link beside SGLang's own PD, turn by turn too, and what checksums cost (root, iproute2); ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.transfer.ttft --json build/bench/transfer_ttft.json \
		--plot build/bench/transfer_ttft.svg $(ARGS)
	$(RUN) -m benchmark.transfer.conversation --json build/bench/transfer_conversation.json $(ARGS)
	$(RUN) -m benchmark.transfer.checksum --json build/bench/transfer_checksum.json $(ARGS)

.PHONY: models
models: venv ## Serve a tiny random model of each family and compare with transformers (half an hour); ARGS="--only Qwen3 --check"
	@mkdir -p build/bench
	$(RUN) -m benchmark.models.serve_families --json build/bench/models.json $(ARGS)

.PHONY: bench-drafts
bench-drafts: venv demo-model ## What speculation on decode (NGRAM, or --drafter) gives and costs, beside a pair without; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.serving.drafts --json build/bench/drafts.json $(ARGS)

.PHONY: bench-tenstorrent
bench-tenstorrent: venv ## What a batch costs the Tenstorrent runtime, counted, and the time predicted from it; no card; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.tenstorrent.cost --json build/bench/tenstorrent_cost.json $(ARGS)

.PHONY: fuzz-messages
fuzz-messages: venv ## 10,000 mutated control messages to each role of real managers; ARGS='COUNT SEED'
	$(RUN) -m test.transfer.fuzz_messages $(ARGS)

.PHONY: fuzz-inputs
fuzz-inputs: venv ## 100,000 inputs to what parses messages, formats, routes and request fields (atheris); ARGS='COUNT SEED'
	$(VENV)/bin/uv pip install --quiet --python $(RUN) -r requirements/fuzz.txt
	$(RUN) -m test.transfer.fuzz_inputs $(ARGS)

.PHONY: fuzz-http
fuzz-http: venv ## 10,000 requests, right, wrong and broken (schemathesis), to each HTTP port of a pair; ARGS="--count N --seed N"
	$(VENV)/bin/uv pip install --quiet --python $(RUN) -r requirements/fuzz.txt
	$(RUN) -m test.fuzz_http $(ARGS)

.PHONY: check-planner
check-planner: venv ## The planner's simulator against closed forms; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.planner.closed_forms --json build/bench/closed_forms.json $(ARGS)

.PHONY: planner-paper
planner-paper: venv ## The paper's table: four models, three traces, ours beside homogeneous serving; ARGS=
	@mkdir -p build/bench
	$(RUN) -m benchmark.planner.paper --json build/bench/planner_paper.json --plot build/bench/planner_paper.svg $(ARGS)

.PHONY: planner-peers
planner-peers: venv ## The simulator beside AIConfigurator's steady state, and its speed; ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.planner.peers --json build/bench/planner_peers.json $(ARGS)
	$(RUN) -m benchmark.planner.speed --json build/bench/planner_speed.json $(ARGS)

.PHONY: planner-real
planner-real: venv ## The planner's simulator beside a real pair on this machine (half an hour); ARGS=--check
	@mkdir -p build/bench
	$(RUN) -m benchmark.planner.real_system --json build/bench/planner_real.json $(ARGS)

QUALITY_MODEL ?= $(DEMO_MODEL)
QUALITY_TEXT ?= prose
COMPARE = $(RUN) -m benchmark.quality.compare --model '$(QUALITY_MODEL)' --text $(QUALITY_TEXT) \
	--json build/quality/$@.json --plot build/quality/$@.svg

.PHONY: quality-main
quality-main: venv demo-model ## Ours against BF16 and its noise floor, 50k tokens; QUALITY_MODEL=DIR QUALITY_TEXT=held-out ARGS=--check
	$(COMPARE) --documents 100 --context 512 --scored 512 $(ARGS)

.PHONY: quality-long
quality-long: venv demo-model ## The same for 20k tokens after 4k
	$(COMPARE) --documents 12 --context 4096 --scored 1728 $(ARGS)

.PHONY: quality-lengths
quality-lengths: venv demo-model ## The same by context length
	$(COMPARE) --documents 6 --context 256 512 1024 2048 4096 7680 --scored 256 $(ARGS)

.PHONY: quality-turns
quality-turns: venv demo-model ## What it costs that decode keeps its own K and V of an earlier reply (--hma-decode-cache all)
	$(COMPARE) --set turns --context 768 --scored 256 $(ARGS)

.PHONY: quality-parts
quality-parts: venv demo-model ## What weights and KV cost, each alone
	$(COMPARE) --set parts --documents 24 $(ARGS)

.PHONY: quality-formats
quality-formats: venv demo-model ## Ours beside FP8, INT8, INT4 and BFP4 KV, and BFP8 weights in decode
	$(COMPARE) --set formats --documents 20 $(ARGS)

.PHONY: quality-outliers
quality-outliers: venv demo-model ## KV formats where some K channels are 32 times as large
	$(COMPARE) --set outliers --outliers 32 --documents 24 $(ARGS)

.PHONY: quality-served
quality-served: venv demo-model ## A real pair of servers beside the harness of the figures above
	$(RUN) -m benchmark.quality.served --model '$(QUALITY_MODEL)' --json build/quality/$@.json $(ARGS)

.PHONY: quality-tasks
quality-tasks: venv demo-model ## lm-evaluation-harness on ours and BF16; TASKS=
	$(VENV)/bin/uv pip install --quiet --python $(RUN) -r requirements/quality.txt
	$(RUN) -m benchmark.quality.tasks --model '$(QUALITY_MODEL)' --tasks $(TASKS) --json build/quality/$@.json $(ARGS)

.PHONY: train
train: venv ## Train the small Qwen3 of docs/quality.md (hours; minutes with ARGS='--device cuda'; goes on where it stopped)
	$(RUN) -m benchmark.quality.train $(ARGS)

.PHONY: faults
faults: venv ## 2 prefill, 2 decode, router: faults at random under load, then a check; ARGS="--seconds 600 --seed N --json FILE"
	@$(RUN) -m test.faults $(ARGS)

.PHONY: recovery
recovery: venv ## How soon requests are answered after a server's death, and what a rolling restart loses; ARGS="--check --json FILE"
	@$(RUN) -m test.faults.recovery $(ARGS)

.PHONY: soak
soak: venv ## Does memory grow with requests? ARGS="--requests 20000 --check --json FILE" (an hour or two)
	@$(RUN) -m test.faults.soak $(ARGS)

.PHONY: repeat-faults
repeat-faults: venv ## Cause each fault SOAK=50 times under load: kill -9, SIGSTOP, dead link, aborts, flipped bytes (hours)
	HMA_SOAK=$(SOAK) $(RUN) -m pytest -o timeout=0 test/e2e/test_faults.py test/e2e/test_link_down.py test/transfer/test_late_writes.py test/transfer/test_protocol.py -s $(PYTEST_ARGS)

.PHONY: sanitize
sanitize: venv ## Run the kernel tests under AddressSanitizer and UBSan
	@VENV='$(VENV)' scripts/sanitize.sh

.PHONY: cubins
cubins: venv ## Compile the CUDA decode kernels that wheels then carry, where nvcc is (minutes)
	@$(RUN) -m hma_kernels.cuda.cubins $(ARGS)

.PHONY: wheel
wheel: venv ## Build the wheel of .venv's Python into dist/
	@echo "wheel: $$($(RUN) -m hma_kernels.cuda.cubins --state)"
	$(VENV)/bin/uv build --wheel --no-build-isolation --python $(RUN) --out-dir dist

.PHONY: wheels
wheels: venv ## Build a wheel for each supported Python of this machine into dist/, and load its kernels
	@VENV='$(VENV)' scripts/wheels.sh

.PHONY: emulate
emulate: venv ## Run the kernel tests of AVX-512 and AVX512_BF16 in an emulated CPU (minutes)
	@VENV='$(VENV)' scripts/emulate.sh

.PHONY: clean
clean: ## Remove what was built, the demo model and the tools' caches; .venv stays
	rm -rf build dist python/*.egg-info *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python hma_kernels test benchmark -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
