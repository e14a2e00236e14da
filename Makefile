# Two commands set up a fresh machine: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Unit tests keep their files in memory, where there is room: on a disk they wait for it.
MEMORY := $(shell test "$$(df --output=avail /dev/shm 2> /dev/null | tail -1)" -gt 2000000 2> /dev/null && echo TMPDIR=/dev/shm)
UNIT_TESTS := $(MEMORY) $(BIN)/python -m pytest tests/unit --numprocesses 2 --dist worksteal -o tmp_path_retention_policy=failed

.PHONY: run test check soak up down install bench bench-peers proto lock clean

run: install            ## the whole loop on real data; leaves nothing running
	$(BIN)/raymill run jobs/flights.py

test: install           ## unit tests on both cores, then actors and loop tests; fails if either did
	failed=0; $(UNIT_TESTS) || failed=$$?; $(BIN)/python -m pytest tests/actors tests/loop || failed=$$?; exit $$failed

check: install          ## lint, types, all but the longest unit tests: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(UNIT_TESTS) -m 'not soak and not long'

soak: install           ## the long versions of the tests
	$(BIN)/python -m pytest tests -m soak --timeout 3600

up: install             ## a cluster to play with
	$(BIN)/raymill up

down:                   ## and away with it
	$(BIN)/raymill down

install: $(STAMP)       ## .venv with everything, nothing started

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

bench: install          ## one claim: make bench CLAIM=serving [QUICK=--quick]
	$(BIN)/python -m benchmarks.$(CLAIM) $(QUICK)

bench-peers:            ## what we measure ourselves against, each in a venv of its own; wrk and h2load
	command -v wrk h2load > /dev/null || apt-get install --yes wrk nghttp2-client
	for peer in benchmarks/peers/*/requirements.txt; do \
	  venv=$$(dirname $$peer)/.venv; \
	  test -e $$venv/.installed && test ! $$peer -nt $$venv/.installed && continue; \
	  $(PYTHON) -m venv $$venv && $$venv/bin/pip install --quiet --requirement $$peer && touch $$venv/.installed || exit 1; \
	done

proto:                  ## write actors/open_inference_pb2.py anew; needs grpcio-tools
	$(BIN)/python -m grpc_tools.protoc -I actors --python_out=actors --pyi_out=actors actors/open_inference.proto

lock:                   ## write requirements.lock anew from what .venv holds
	$(BIN)/pip freeze --all --exclude-editable | grep -v -e '^pip==' -e '^raymill' > requirements.lock

clean:                  ## remove the environment and all state
	rm -rf .venv .raymill build dist *.egg-info
