# make repro: the whole pipeline on the embedded sample. make test: the test suite. Both need only Python 3.11 and make.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: repro doctor able heal experiments test test-fast lint bench bench-serve ablations seeds results tables grid pick mlflow clean

$(VENV)/.installed: requirements.lock
	@echo "installing into $(VENV), once: some 2 GB, 2 to 5 minutes; a line a package" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.lock)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	touch $@

repro: able $(VENV)/.installed
	@$(BIN)/python stages/heal.py --locks  # of a run that was killed
	$(BIN)/dvc repro

CHECK = VENV=$(VENV) $$(test -x $(BIN)/python && echo $(BIN)/python || command -v $(PYTHON) || echo python3) stages/doctor.py

doctor:  # what this machine lacks, one line each with the mend
	@$(CHECK)

able:  # the same, quiet where all is well
	@$(CHECK) --quiet

heal:  # what a killed dvc left: lock files, references of experiments, the branch
	@$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) stages/heal.py

test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed lint  # without the files that run the DAG, start processes or train at length
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check stages tests

experiments: $(VENV)/.installed  # what experiments changed, and LLMGR's figures in each; `dvc metrics diff` has 40 of them
	$(BIN)/dvc exp show --only-changed --drop 'baselines|.*(unseen|mrr|memory)'

results: $(VENV)/.installed  # keep the current results under reports/results/<dataset>/, or NAME=office-wide
	$(BIN)/python stages/record.py $(if $(NAME),--name $(NAME))

tables: $(VENV)/.installed  # the tables of README.md and reports/*.md from the records
	$(BIN)/python stages/tables.py

grid: $(VENV)/.installed  # search a model's parameters in the background: make grid MODEL=gcsan DATASET=office SET="-S ..."
	@$(BIN)/python stages/heal.py --queue
	@test -f stages/presets/grid/$(MODEL).txt || { echo "error: MODEL=$(MODEL) has no grid; there are $$(ls stages/presets/grid | sed 's/.txt//' | xargs)" >&2; exit 2; }
	@test -n "$(DATASET)" || { echo "error: DATASET is not given, such as DATASET=office" >&2; exit 2; }
	$(BIN)/dvc exp run --queue $(if $(filter llmgr,$(MODEL)),track,trial@$(MODEL) -S 'track.trials=[$(MODEL)]') $$(cat stages/presets/grid/$(MODEL).txt) -S data.dataset=$(DATASET) $(SET)
	$(BIN)/dvc queue start -j 1

pick: $(VENV)/.installed  # when `dvc queue status` says that all is done: the best by validation into params.yaml
	@test -n "$(MODEL)" -a -n "$(DATASET)" || { echo "error: give both, such as MODEL=gcsan DATASET=office" >&2; exit 2; }
	$(BIN)/python stages/pick.py --model $(MODEL) --dataset $(DATASET)

ablations: $(VENV)/.installed  # LLMGR with one thing taken away, in the background; then python stages/ablations.py
	@$(BIN)/python stages/heal.py --queue
	for ablation in stages/presets/ablations/*.txt; do \
		changed=$$($(BIN)/python stages/ablations.py --options $$ablation) && \
		$(BIN)/dvc exp run --queue track $$changed $(SET) || exit 1; done
	$(BIN)/dvc queue start -j 1

seeds: $(VENV)/.installed  # the same at other seeds, in the background: make seeds SEEDS="1 2"; then python stages/seeds.py
	@$(BIN)/python stages/heal.py --queue
	@test -n "$(SEEDS)" || { echo "error: SEEDS is not given, such as SEEDS=\"1 2\"" >&2; exit 2; }
	for seed in $(SEEDS); do $(BIN)/dvc exp run --queue track -S seed=$$seed $(SET) || exit 1; done
	$(BIN)/dvc queue start -j 1

bench: $(VENV)/.installed  # the tuning step's speed against the machine's
	$(BIN)/python stages/bench.py

bench-serve: $(VENV)/.installed  # the recommender's speed on one core
	OMP_NUM_THREADS=1 $(BIN)/python stages/bench_serve.py

mlflow: $(VENV)/.installed  # open http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=columns and compare experiments
	$(BIN)/mlflow server --workers 1 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

clean:
	rm -rf .resume .pytest_cache .ruff_cache
