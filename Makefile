.PHONY: test lint bench soak setup setup-test demo demo-stop

test: lint
	.venv/bin/pytest

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup-test
	.venv/bin/python -m tests.bench

soak: setup-test
	TAHOEFS_SOAK=1 TAHOEFS_KILL_ROUNDS=1000 .venv/bin/pytest -s tests/real/test_crash.py tests/real/test_many_writers.py
	TAHOEFS_SOAK=1 TAHOEFS_KILL_ROUNDS=100 .venv/bin/pytest -s tests/grid/server/test_kill.py \
		tests/grid/server/test_load.py tests/grid/server/test_hostile.py tests/cache/test_block_store.py \
		tests/cache/test_block_scale.py tests/cache/test_pin_store.py tests/cache/test_pins.py tests/cache/test_workspace_model.py

demo:
	@tools/demo

demo-stop:
	@tools/demo stop

setup:
	tools/setup

setup-test:
	tools/setup test
