# make demo | test | test-all | check | soak | acceptance | flaky | coverage | audit | docs | first-boot | release | release-check | image-check | notes | sbom | pins | clean
PYTHON ?= python3
VENV := .venv
DEV := .venv-dev
BOARD := .venv-py310
FLOWER := build/flower
TOOLS := build/tools
PIP := pip install -q -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(shell find toolkit export device_runtime server hardware_profiles -type f -not -path '*/__pycache__/*')

SHIPPED := toolkit/fedprune toolkit/fedprune_start export/fedprune_export device_runtime/fedprune_device \
	device_runtime/fedprune_flash server/fedprune_server
EXTRAS ?= board,completion,console,export,fast,flash,hub,mlflow,notify,parquet,privacy,scale,server,tensorboard,tracing,wandb
COMMA := ,
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# A Python 3.10, where a board's code runs too; on many machines only pyenv has one.
PYTHON310 := $(shell for p in python3.10 $(HOME)/.pyenv/versions/3.10*/bin/python3.10; do \
	$$p -c '' 2>/dev/null && { echo $$p; break; }; done)

# Tests run on all cores, those of a file one after the other, and the folder with the shortest (toolkit) comes last, so
# that no core waits long for the others. Much of their time is waiting: two processes share a core, where there are
# 1.5 GiB of memory for each, which is what torch, onnxruntime and a test's model take. ARGS="-n 0 -k name" runs a few
# without that.
WORKERS := $(shell awk -v most=$$((2 * $$(nproc))) '/^MemAvailable/ { fit = int($$2 / 1572864); \
	print fit < 1 ? 1 : fit < most ? fit : most }' /proc/meminfo 2>/dev/null)
AT_ONCE := -n $(or $(WORKERS),auto) --dist loadfile --no-loadscope-reorder

# Tests kill processes, never a machine: where eatmydata is installed the processes that they start don't wait for the
# disk either.
UNSYNCED := $(shell command -v eatmydata)

# Examples of each property: with `make test-all`, with `make test`, and under Python 3.10; `make soak` tries all.
QUICK := not slow and not soak and not arm64 and not acceptance
EXAMPLES := 10
QUICK_EXAMPLES := 3
BOARD_EXAMPLES := 5

export OMP_NUM_THREADS ?= 1
export MPLBACKEND = Agg

.PHONY: environments demo test test-all test-dev test-board test-arm64 check flaky coverage audit docs soak acceptance first-boot release release-check image-check notes sbom pins clean

demo: $(VENV)/installed
	@echo "running the demo: a minute or more, by the cores that are free"
	@$(VENV)/bin/fedprune-server demo --out demo-run

# Some four minutes: the quick tests of the push ring, by tests/push_ring.json.
test: $(DEV)/installed
	FEDPRUNE_EXAMPLES=$(QUICK_EXAMPLES) $(UNSYNCED) $(DEV)/bin/pytest $(AT_ONCE) -m "$(QUICK)" -q $(ARGS)

# The push ring: what must pass before a change lands. Boards' code runs under Python 3.10, too.
test-all: test-dev test-board

test-dev: $(DEV)/installed $(FLOWER)/installed
	FEDPRUNE_EXAMPLES=$(EXAMPLES) $(UNSYNCED) $(DEV)/bin/pytest $(AT_ONCE) $(ARGS)

# The push ring RUNS times in random orders, beside LOAD busy processes in every second run; lists what failed how often.
RUNS ?= 6
LOAD ?= 6
flaky: $(DEV)/installed $(FLOWER)/installed
	FEDPRUNE_EXAMPLES=$(EXAMPLES) $(UNSYNCED) $(DEV)/bin/python tests/flaky.py --runs $(RUNS) --load $(LOAD) -- $(AT_ONCE) $(ARGS)

# Which share of the branches that any test takes the quick ones take: all of them under coverage, some hours.
COVERED = $(DEV)/bin/coverage
coverage: $(DEV)/installed $(FLOWER)/installed
	rm -rf build/coverage && mkdir -p build/coverage
	COVERAGE_FILE=build/coverage/quick FEDPRUNE_EXAMPLES=$(QUICK_EXAMPLES) $(UNSYNCED) $(COVERED) run -m pytest $(AT_ONCE) -q -m "$(QUICK)" $(ARGS)
	-COVERAGE_FILE=build/coverage/push FEDPRUNE_EXAMPLES=$(EXAMPLES) $(UNSYNCED) $(COVERED) run -m pytest $(AT_ONCE) -q $(ARGS)
	-COVERAGE_FILE=build/coverage/soak $(UNSYNCED) $(COVERED) run -m pytest $(AT_ONCE) -q -m "soak or hypothesis" --timeout 3600 $(ARGS)
	for ring in quick push soak; do export COVERAGE_FILE=build/coverage/$$ring; \
		$(COVERED) combine -q && $(COVERED) json -q --ignore-errors -o $$COVERAGE_FILE.json; done
	$(DEV)/bin/python tests/coverage_of_rings.py build/coverage/quick.json build/coverage/push.json build/coverage/soak.json

# What a board imports, on the Python and onnxruntime of JetPack 6; its slow tests are left to soaks.
ON_BOARD = board and not torch and not soak and not once and not slow
test-board: $(if $(PYTHON310),$(BOARD)/installed)
ifeq ($(PYTHON310),)
	@if [ -n "$$CI" ]; then echo "python3.10 is missing: the board's tests can't run under it"; exit 1; \
	else echo "SKIPPED: no python3.10 here, so the board's tests ran under $$($(PYTHON) --version) only"; fi
else
	FEDPRUNE_EXAMPLES=$(BOARD_EXAMPLES) $(UNSYNCED) $(BOARD)/bin/pytest $(AT_ONCE) -m "$(ON_BOARD)" \
		tests/toolkit tests/device
endif

# Boards with Arm processors, in an emulator: needs qemu-user-static, qemu-user, proot, mmdebstrap and gcc. Tests of a
# file run at once, too: those of one take most of the time.
test-arm64: $(DEV)/installed
	$(DEV)/bin/pytest -n auto --dist loadgroup --no-loadscope-reorder -m arm64 tests/arm64 $(ARGS)

# All that `test` runs in; `make -j` makes them at once.
environments: $(DEV)/installed $(FLOWER)/installed $(if $(PYTHON310),$(BOARD)/installed)

check: $(DEV)/installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports --no-cache
	$(DEV)/bin/python tests/support/push_ring.py check
	$(DEV)/bin/python tests/support/room_lines.py check
	$(DEV)/bin/python -m benchmarks.accuracy older
	$(DEV)/bin/python tests/support/names.py
	$(DEV)/bin/python -m manual --check

# What is shipped, looked at by bandit, and the versions of constraints.txt, asked of the advisories' service: needs a network.
# A finding that is none has a comment of its own in its line, which says why.
# ("nosec encountered, but no failed test" says only that the rest of such a line is fine.)
audit: $(DEV)/installed
	$(DEV)/bin/bandit -q -r $(SHIPPED)
	$(DEV)/bin/pip-audit --no-deps --disable-pip --strict --requirement constraints.txt --requirement deploy/constraints.txt --progress-spinner off

# What is in a release: wheel and sdist, the same bytes wherever the same commit is built, what their extras install
# (CycloneDX), and the digests of all of them. Wheel and sdist are hashed, in the memory of this shell, before anything that no hash
# covers is fetched for the list; a change of them afterwards ends this.
release: $(TOOLS)/installed
	rm -rf build/release dist/fedprune-* && mkdir -p build/release dist
	git archive HEAD | tar -x -C build/release
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(TOOLS)/bin/python -m build --no-isolation --outdir dist build/release
	digests=$$(cd dist && sha256sum fedprune-*) && $(MAKE) --no-print-directory sbom && cd dist && \
		printf '%s\n' "$$digests" | sha256sum --check --strict && \
		{ printf '%s\n' "$$digests"; sha256sum fedprune-$(VERSION).cdx.json; } >SHA256SUMS && cat SHA256SUMS
	@echo "dist/ has release $(VERSION); nothing is uploaded. docs/release.md says how a maintainer publishes it, by one tag."

# Two releases of the latest commit, byte by byte, then its wheel and demo in bare Debian userlands: needs mmdebstrap. Some
# twenty minutes.
release-check: $(DEV)/installed
	$(DEV)/bin/pytest -m acceptance tests/acceptance/test_release.py $(ARGS)

# The container images, built and run without a registry: needs root, buildah, mmdebstrap, qemu-user-static and proot. Some
# ten minutes.
image-check: $(DEV)/installed
	$(DEV)/bin/pytest -m acceptance tests/acceptance/test_images.py $(ARGS)

# A release's text for its tag and its page: the introduction of its section in the changelog, up to the first topic.
notes:
	@sed -n '/^## $(VERSION)\b/,/:$$/{/^## /d;/:$$/d;p}' CHANGELOG.md

# Of the packages of these extras, which are unpacked for it. None of their code runs: no source archive is built, and no Python starts
# with their folder, whose .pth files it would execute; cyclonedx-py asks a script for the path.
sbom: $(TOOLS)/installed
	rm -rf build/sbom && mkdir -p build/sbom dist
	$(TOOLS)/bin/python -m build --wheel --no-isolation --outdir build/sbom .
	$(TOOLS)/bin/pip install -q --no-compile --only-binary :all: --target build/sbom/packages -c deploy/constraints.txt "$$(echo build/sbom/fedprune-*.whl)[$(EXTRAS)]"
	printf '#!/bin/sh\necho '"'"'["%s"]'"'"'\n' "$(CURDIR)/build/sbom/packages" >build/sbom/path && chmod +x build/sbom/path
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
		--output-reproducible --of JSON --output-file dist/fedprune-$(VERSION).cdx.json build/sbom/path

# The files that lock what is installed, after every change of pyproject.toml's requirements or of constraints.txt: what releases are built
# with, an image of the server and a board's wheels, with sha256, and the versions of all extras. Versions stay where they can; to take
# the newest ones, delete a file first.
COMPILE = $(DEV)/bin/uv pip compile -q --universal --only-binary :all: --no-annotate --custom-compile-command 'make pins' -c constraints.txt
pins: $(DEV)/installed
	$(COMPILE) --python-version 3.11 pyproject.toml $(patsubst %,--extra %,$(subst $(COMMA), ,$(EXTRAS))) -o deploy/constraints.txt
	$(COMPILE) --python-version 3.11 --generate-hashes -c deploy/constraints.txt pyproject.toml deploy/locks/server.in \
		--extra server --extra console --extra notify --extra privacy --extra tracing -o deploy/locks/server.txt
	$(COMPILE) --python-version 3.11 --generate-hashes deploy/locks/build.in -o deploy/locks/build.txt
	$(COMPILE) --python-version 3.10 --generate-hashes pyproject.toml --extra board -o device_runtime/fedprune_flash/kit/board_wheels.txt

# What the code says of itself, written into docs/; then the site, in build/site. Without a network.
docs: $(DEV)/installed
	$(DEV)/bin/python -m manual
	NO_MKDOCS_2_WARNING=1 $(DEV)/bin/python -m mkdocs build

# The soak ring: long runs, products of kill points, further nets and services; and all examples of every property.
soak: $(DEV)/installed $(FLOWER)/installed
	$(DEV)/bin/pytest -m "soak or hypothesis" --timeout 3600 $(ARGS)
	$(MAKE) --no-print-directory test-board ON_BOARD="board and not torch and not soak and not once and slow"

# The acceptance ring: what is made for users, tried where they would: bare Debians, images, boards in an emulator.
acceptance: test-arm64 release-check image-check first-boot

# An image's first boot, in a virtual machine: needs what test-arm64 does, and qemu-system-arm, mtools, fdisk, e2fsprogs,
# dosfstools, fakechroot and fakeroot. Some minutes.
first-boot: $(DEV)/installed
	$(DEV)/bin/pytest -m acceptance tests/acceptance/test_first_boot.py $(ARGS)

# On a terminal pip shows what it fetches.
$(VENV)/installed: $(SOURCES)
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing fedprune and what a server and a board need into $(VENV)"
	@if [ -t 1 ]; then $(VENV)/bin/$(PIP:-q=) --no-compile '.[board,server]'; else $(VENV)/bin/$(PIP) --no-compile '.[board,server]'; fi
	@# Ours at once: six boards of the demo would compile the same modules beside each other.
	@$(VENV)/bin/python -m compileall -q $(VENV)/lib/python3*/site-packages/fedprune*
	@touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/$(PIP) -e '.[dev]'
	# Peers that tests compare with; their own dependencies (torchvision) are not needed.
	$(DEV)/bin/$(PIP) --no-deps torch-pruning timm
	@touch $@

# What builds a release, from files of known bytes.
$(TOOLS)/installed: deploy/locks/build.txt
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/pip install -q --require-hashes --only-binary :all: -r deploy/locks/build.txt
	@touch $@

# A peer that tests compare with, in an environment of its own: its dependencies are not ours.
$(FLOWER)/installed:
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/pip install -q flwr==1.41.0
	@touch $@

$(BOARD)/installed: pyproject.toml constraints.txt
	$(PYTHON310) -m venv $(BOARD)
	$(BOARD)/bin/$(PIP) -e '.[board]' pytest pytest-timeout pytest-xdist hypothesis tomli
	@touch $@

clean:
	rm -rf $(VENV) $(DEV) $(BOARD) dist build demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis
