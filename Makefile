# Everything a fresh machine needs is installed by these targets; caches live in the user's cache folder.
SHELL := bash
.DEFAULT_GOAL := help
export UV_PYTHON_DOWNLOADS := never
PYTHON ?= python3
PORT ?= 8000
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/evenhand
UV_VERSION := 0.13.9
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
EXTRAS := --extra gpu --extra model --extra operator --extra test

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(UV):
	$(PYTHON) -m venv $(CACHE)/uv-$(UV_VERSION) && $(CACHE)/uv-$(UV_VERSION)/bin/pip install -q uv==$(UV_VERSION)

.venv/installed: requirements.lock pyproject.toml | $(UV)
	test -x .venv/bin/python || $(UV) venv -q --python $(PYTHON) .venv
	$(UV) pip sync -q --compile-bytecode --python .venv/bin/python --require-hashes requirements.lock
	$(UV) pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	touch $@

.PHONY: help install serve demo check clients crds dashboards cluster images image-archives node node-shell e2e-node e2e-kind test soak mutants lock kernels gpu gpu-wheels plots bench-% bench-operator
install: .venv/installed  ## fill .venv with the locked packages and the project itself

serve: install  ## serve the default model at http://127.0.0.1:$(PORT)/v1
	.venv/bin/evenhand serve --port $(PORT)

demo: install  ## the noisy-neighbour incident under static, fcfs and fair: a table and a plot
	.venv/bin/python benchmarks/incident.py --demo

check: install  ## format, lint, types, import contracts, YAML
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/mypy benchmarks/*.py
	.venv/bin/lint-imports
	.venv/bin/yamllint --strict .

crds: install  ## write crds/ and the field reference in docs/policies.md from engine/evenhand_policy
	PYTHONPATH=tools .venv/bin/python -m schema.crd crds
	PYTHONPATH=tools .venv/bin/python -m schema.reference docs/policies.md

dashboards: install  ## write Grafana's dashboards in manifests/components/monitoring from tools/dashboards
	PYTHONPATH=tools .venv/bin/python -m dashboards.grafana manifests/components/monitoring/dashboards

cluster:  ## build the control plane for tests into the cache: 16 minutes, once
	$(PYTHON) e2e/cluster/build.py

images:  ## build the container images that the manifests name, with Docker
	docker build -f manifests/images/Dockerfile --target operator -t evenhand.dev/operator:dev .
	docker build -f manifests/images/Dockerfile --target engine -t evenhand.dev/engine:dev .
	docker build -f manifests/images/Dockerfile --target engine-cuda -t evenhand.dev/engine:dev-cuda .

node: cluster  ## build a node's programs and the images without Docker, into the cache: 20 minutes, once (root, Debian)
	PYTHONPATH=e2e $(PYTHON) -m cluster.node_build

image-archives:  ## build them without Docker, for the tests, into the cache: 8 minutes the first time (root, Debian)
	PYTHONPATH=e2e $(PYTHON) -m cluster.images

# namespaces for network, mounts and processes, which end with it
ISOLATED = PYTHONPATH=e2e $(PYTHON) -m cluster.isolated

test: install  ## start the real components and run every test that this machine can run
	$(PYTHON) e2e/cluster/build.py --if-possible
	PYTHONPATH=e2e $(PYTHON) -m cluster.node_build --if-possible
	.venv/bin/pytest -m "not soak and not node"
	$(ISOLATED) .venv/bin/pytest -m node e2e

e2e-node: install node  ## install on a real node with real containers, use, upgrade, roll back, remove (root, Debian)
	$(ISOLATED) .venv/bin/pytest -m node e2e

node-shell: install node  ## a shell beside a real node, with kubectl, until it is left (root, Debian)
	$(ISOLATED) .venv/bin/python -m cluster.own_node

KIND := evenhand-e2e
e2e-kind: install cluster images  ## the same tests on kind, where Docker and kind are
	kind create cluster --name $(KIND) --kubeconfig build/kind.kubeconfig
	kind load docker-image evenhand.dev/operator:dev evenhand.dev/engine:dev --name $(KIND)
	EVENHAND_KUBECONFIG=build/kind.kubeconfig .venv/bin/pytest -m node e2e; \
		status=$$?; kind delete cluster --name $(KIND) --kubeconfig build/kind.kubeconfig; exit $$status

soak: install  ## long property searches and churn
	.venv/bin/pytest -m soak --hypothesis-profile=soak

COSMIC_RAY := $(CACHE)/cosmic-ray-8.7.0
$(COSMIC_RAY)/bin/python: | $(UV)
	$(UV) venv -q --python $(PYTHON) $(COSMIC_RAY)
	$(UV) pip install -q --python $@ cosmic-ray==8.7.0

mutants: install $(COSMIC_RAY)/bin/python  ## change operator and policy at random, and see whether a test notices (ARGS="--number 40 --seed 2")
	$(COSMIC_RAY)/bin/python tools/mutants.py $(ARGS)

GPU_SITE := build/gpu-site
gpu:  ## on a machine with a GPU: correctness, parity and every number that needs one (ARGS="--device emulated": a rehearsal)
	PYTHONPATH=engine:cuda:$(GPU_SITE) $(PYTHON) benchmarks/gpu.py $(ARGS)

gpu-wheels: | $(UV)  ## what `make gpu` needs beside torch, CuPy and transformers for Python 3.12, for a machine without a network
	rm -rf $(GPU_SITE)
	$(UV) pip install -q --target $(GPU_SITE) --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--no-deps --only-binary :all: --constraint requirements.lock gguf msgspec psutil rich markdown-it-py mdurl pygments

kernels: install  ## the CUDA kernels without a GPU: machine code of every variant, every case emulated, every mutant
	.venv/bin/python -m evenhand_kernels.checks $(CACHE)

plots: install  ## remake the pictures in docs/images
	.venv/bin/evenhand simulate --trace benchmarks/data/arena_trace.csv --max-model-len 2048 --no-enable-prefix-caching \
		--scheduling-policy fcfs --scheduling-policy vtc --scheduling-policy fair --plot docs/images/arena.png

bench-%: install  ## run benchmarks/NAME.py (dashes for underscores)
	PYTHONPATH=e2e .venv/bin/python benchmarks/$(subst -,_,$*).py $(ARGS)

bench-operator: bench-operator-scale  # a file operator.py would hide the standard library's from all beside it

CLIENTS_LOCK := tests/clients/requirements.lock
CLIENTS := $(CACHE)/clients-$(shell sha256sum $(CLIENTS_LOCK) | cut -c1-16)
$(CLIENTS)/installed: | $(UV)
	test -x $(CLIENTS)/bin/python || $(UV) venv -q --python $(PYTHON) $(CLIENTS)
	$(UV) pip sync -q --python $(CLIENTS)/bin/python --require-hashes $(CLIENTS_LOCK)
	touch $@

clients: install $(CLIENTS)/installed  ## the server as the clients of others use it, in an environment of their own
	EVENHAND=$(CURDIR)/.venv/bin/evenhand $(CLIENTS)/bin/python -m pytest -W ignore -p no:cacheprovider --confcutdir tests/clients tests/clients $(ARGS)

COMPILE = $(UV) pip compile -q --universal --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock"
IMAGES := manifests/images/packages
lock: | $(UV)  ## resolve pyproject.toml again into requirements.lock, what each image has of it, and what `make clients` needs
	$(COMPILE) $(EXTRAS) pyproject.toml -o requirements.lock
	cp requirements.lock $(CLIENTS_LOCK)
	$(COMPILE) --extra clients pyproject.toml -o $(CLIENTS_LOCK)
	$(COMPILE) -p 3.13 -c requirements.lock pyproject.toml --excludes $(IMAGES)/cuda.txt -o $(IMAGES)/engine.lock
	$(COMPILE) -p 3.13 -c requirements.lock pyproject.toml --extra gpu -o $(IMAGES)/engine-cuda.lock
	$(COMPILE) -p 3.13 -c requirements.lock $(IMAGES)/operator.in -o $(IMAGES)/operator.lock
	$(COMPILE) -p 3.13 -c requirements.lock $(IMAGES)/build.in -o $(IMAGES)/build.lock
	$(COMPILE) -p 3.13 -c requirements.lock $(IMAGES)/model.in --no-deps -o $(IMAGES)/model.lock
