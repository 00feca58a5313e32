# What contributors type, with the tools of the environment that is active. CONTRIBUTING.md says how to make one.
.DEFAULT_GOAL := help
.PHONY: help install test-fast test docs bench package

help:  ## show these lines
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install:  ## the package, its tests' tools and the commit hooks
	pip install -c constraints.txt -e ".[quickstart,test]"
	pip install -c constraints.txt --no-deps neurobench spikingjelly
	pre-commit install

test-fast:  ## the oracles of model, operators and energy: minutes
	pytest -m "not slow"

test:  ## all tests, with format, lint and types
	pytest

docs:  ## the site, with warnings as errors
	sphinx-build -W -q -c docs . site

bench:  ## time and memory on this machine: inference and training
	python examples/benchmarks/inference.py
	python examples/benchmarks/training.py

package:  ## sdist and wheel in dist/
	python -m build
