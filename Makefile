.PHONY: test lint bench setup setup-test demo demo-stop

test: lint
	.venv/bin/pytest

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup-test
	.venv/bin/python -m tests.bench

demo:
	@tools/demo

demo-stop:
	@tools/demo stop

setup:
	tools/setup

setup-test:
	tools/setup test
