CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: install test test-all lint format bench kernels env sdist docs drawings fits

install:
	pip install .

test:
	pytest

test-all:
	pytest -m "slow or not slow"

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_SOURCES)
	mypy

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

bench:
	python benchmarks/memory_vs_hrnet.py

kernels:
	python benchmarks/kernels.py

env:
	python -m revkernels.env

sdist:
	python -m build --sdist

docs:
	python -m sphinx --fail-on-warning --keep-going -j auto -b html docs docs/_build/html

drawings:
	python docs/draw.py

fits:
	python benchmarks/fits.py
