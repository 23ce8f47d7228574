# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up: virtual environment, build. Debian packages (as root, only those that are missing) come
# with run, test, fuzz, golden, verifier and bench; before the others, `make packages-test` installs them.
#
#   make run          the daemon on its main job: the local swarm, else an embedded demo with its own backends
#   make test         lint and all tests, end to end on a real dockerd swarm in namespaces (root)
#   make test-all     the same with other random examples, and long scenarios with the second engine too: some minutes more
#   make build        virtual environment from requirements-dev.lock, extensions, eBPF objects
#   make packages-test   the Debian packages for all of this but bench; packages-build: those for run and build
#   make unit         the fast loop: pure tests, half a minute (neither root nor Docker nor network)
#   make lint         ruff, mypy, clang-format, codespell
#   make format       ruff and clang-format, in place
#   make golden       write the golden files of tests/scenarios anew (root): read the difference before you commit it
#   make docs         write the generated parts of the documents anew
#   make coverage     the unit tests with coverage of mesh/, as a table and in build/coverage/
#   make lock         resolve the requirements anew: requirements.lock (runtime and build), requirements-dev.lock (all)
#   make release      sources, SBOM (CycloneDX) and their checksums in dist/; KEY=FILE signs them with an SSH key (SECURITY.md)
#   make fuzz         a million random packets through the eBPF programs and their model (minutes)
#   make random       random flows through three nodes while tasks and tables change: 200,000 with each engine, some ten
#                     minutes (root); FLOWS=N, SEED=N (that of the first run, printed with each), ARGS="--engine proxy"
#   make sanitize     the engine's suite on an AddressSanitizer + UBSan build
#   make annotate     HTML of what Cython made of each line of the proxy engine, in build/annotate/
#   make bench        measurements against peers, up to 20 minutes (root); bench-quick: up to 4; bench-against: with another build, 10; bench-cluster: a swarm, 6;
#                     bench-scale: a large swarm on paper, 5; bench-detection: from a fault to its name, 15
#   make verifier     what the kernel's verifier says of each program, against bpf/verifier.tsv (root); UPDATE=1 writes the table
#   make clean        remove everything that was built

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
PYTEST ?= $(BIN)/python -m pytest
# How many tests run at once, for two processors: tests of swarms wait more than they compute. 0: one after the other, as a
# debugger wants it.
WORKERS ?= 3
# Where it is set, each start of a daemon would compile all of its modules anew.
export PYTHONDONTWRITEBYTECODE :=

BUILD_PACKAGES := gcc libc6-dev make python3-venv python3-dev clang-16/clang libbpf-dev libelf-dev zlib1g-dev linux-libc-dev iproute2
TEST_PACKAGES  := $(BUILD_PACKAGES) git bpftool iptables nftables ethtool tcpdump util-linux procps haproxy nginx-light prometheus \
                  docker.io docker-cli/docker.io python3-bpfcc linux-headers-amd64 qemu-system-x86 busybox-static cpio kmod openssh-client wireguard-tools

C_FILES := $(wildcard mesh/*.h mesh/*/*.h bpf/*.c bpf/*/*.h bpf/include/mesh/*.h bench/*/*.c tests/support/peers/*.[ch] tests/support/lab/voting/*.[ch])
SOURCES := $(wildcard $(foreach kind,pyx pxd h,mesh/*.$(kind) mesh/*/*.$(kind)) bpf/*.c bpf/*/*.h bpf/include/mesh/*.h)

.PHONY: run test test-all fuzz random unit golden lint format docs verifier coverage lock release sbom base-image sanitize annotate bench bench-quick bench-against bench-cluster bench-scale bench-detection bench-deps build clean packages-build packages-test packages-bench

run: packages-build build
	$(BIN)/mesh run $(ARGS)

build: $(VENV)/.built

$(VENV)/.deps: requirements-dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	touch $@

$(VENV)/.built: $(VENV)/.deps pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

packages-build:
	deploy/debian-packages $(BUILD_PACKAGES)

packages-test:
	deploy/debian-packages $(TEST_PACKAGES)

unit: build
	$(PYTEST) -q -n $(WORKERS) tests/unit $(ARGS)

test: packages-test build lint
	$(PYTEST) -n $(WORKERS) tests --durations=30 $(ARGS)

test-all: export MESH_TEST_ALL = 1
test-all: test

fuzz: packages-test build
	MESH_FUZZ_PACKETS=1000000 $(PYTEST) -q tests/bpf/test_fuzz.py $(ARGS)

random: packages-test build
	$(BIN)/python -m tests.flows $(if $(FLOWS),--flows $(FLOWS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

docs: build
	$(BIN)/python -m tests.unit.test_docs

# Fails where a program takes 10 % more of the verifier's instructions than the table says.
verifier: packages-build build
	$(BIN)/python -m bench.verifier $(if $(UPDATE),--update)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/codespell

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

golden: packages-test build
	$(PYTEST) -q tests/scenarios --update-golden $(ARGS)

# Commands that tests start are measured too.
coverage: build
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/unit $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

# One resolution for Python 3.11 to 3.13 on every platform, with the hashes of all files of a release.
LOCK := build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate pyproject.toml
lock: export UV_CUSTOM_COMPILE_COMMAND = make lock
lock:
	test -x build/lock/bin/uv || { $(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet uv; }
	$(LOCK) --extra build -o requirements.lock $(ARGS)
	$(LOCK) --extra build --extra dev -c requirements.lock -o requirements-dev.lock $(ARGS)

# What is released: the sources of this commit, what they need, and what proves both.
DIST := dist
release: sbom
	git archive --format=tar.gz --prefix=mesh/ -o $(DIST)/mesh.tar.gz HEAD
	cd $(DIST) && sha256sum mesh.tar.gz mesh.cdx.json > SHA256SUMS && rm -f SHA256SUMS.sig
	test -z "$(KEY)" || ssh-keygen -q -Y sign -n mesh -f "$(KEY)" $(DIST)/SHA256SUMS

sbom:
	mkdir -p $(DIST)
	$(PYTHON) deploy/sbom.py > $(DIST)/mesh.cdx.json

# The base of deploy/Dockerfile by its digest of now.
base-image:
	docker buildx imagetools inspect debian:12-slim --format 'debian:12-slim@{{.Manifest.Digest}}'

# Measurements need root, and a machine that does nothing else: bench/README.md.
BENCH_PACKAGES := $(BUILD_PACKAGES) nftables nginx-light libnginx-mod-stream docker.io docker-cli/docker.io procps \
                  util-linux ipvsadm qemu-system-x86 busybox-static cpio kmod

packages-bench:
	deploy/debian-packages $(BENCH_PACKAGES)

bench-deps: packages-bench build bench/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	$(MAKE) --no-print-directory --silent -C bench/load
	$(MAKE) --no-print-directory --silent -C bench/prog

bench: bench-deps
	$(BIN)/python -m bench.run $(ARGS)
	$(BIN)/python -m bench.report

# A swarm of five nodes: how long a change takes to the last node's table (6 minutes). After `make bench`, whose report gets it.
bench-cluster: bench-deps
	$(BIN)/python -m bench.cluster $(ARGS)
	test ! -e bench/out/latest.json || $(BIN)/python -m bench.report

# Two agents in a simulated swarm of 1,000 nodes, and in larger ones (5 minutes, at most 8). After `make bench`, whose report gets it.
bench-scale: bench-deps
	$(BIN)/python -m bench.scale $(ARGS)
	test ! -e bench/out/latest.json || $(BIN)/python -m bench.report

# Three nodes: how long after a fault another one names it, and what the trials of paths cost (15 minutes; ARGS="--trials 5").
bench-detection: bench-deps
	$(BIN)/python -m bench.detection $(ARGS)

# Is this build as fast as another? TREE=DIR: a checkout of that, built (`make build` there); 12 minutes.
bench-against: bench-deps
	$(BIN)/python -m bench.against $(TREE) $(ARGS)

bench-quick: bench-deps
	$(BIN)/python -m bench.run --quick $(ARGS)
	$(BIN)/python -m bench.report

# A build of its own with AddressSanitizer, LeakSanitizer and UBSan; the engine's tests run on it.
SANITIZED := build/sanitize/lib
sanitize: build
	mkdir -p $(SANITIZED)
	MESH_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-base build/sanitize/obj --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)/
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=1:halt_on_error=1 LSAN_OPTIONS=suppressions=tests/lsan.supp:print_suppressions=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/engines/test_fastpath_*.py $(ARGS)

# Cython's annotation: the darker a line, the more of the Python API it uses. The data path has none.
annotate: $(VENV)/.deps
	for source in mesh/_fastpath.pyx mesh/fastpath/*.pyx; do \
		page=build/annotate/$${source%.pyx}; mkdir -p $${page%/*} && $(BIN)/cython --annotate -o $$page.c $$source && rm $$page.c || exit 1; \
	done

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info $(VENV) bench/out
	find mesh -name '*.so' -delete
	find mesh -name '*.o' -delete
