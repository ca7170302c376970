.PHONY: test lint bench setup setup-test

test: lint
	.venv/bin/pytest

lint: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup-test
	.venv/bin/python -m tests.bench

setup:
	tools/setup

setup-test:
	tools/setup test
