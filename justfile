# Commands for contributors; `just --list` shows them.

# install the package for development
setup:
    pip install -e '.[dev]'

# run the tests
test *arguments:
    pytest {{ arguments }}

# run the tests that take minutes: whole demos and recipes
slow:
    pytest -m slow

# check style
lint:
    ruff check .
    ruff format --check .

# check types
types:
    mypy

# correct style
format:
    ruff check --fix .
    ruff format .
