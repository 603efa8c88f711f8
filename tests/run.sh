#!/usr/bin/env bash
# Sets up the environment, checks format and lint, and runs all tests. Flags go to pytest:
#
#     bash tests/run.sh
#     bash tests/run.sh -k resume
#     bash tests/run.sh --long      # what is random much more often, about an hour
set -euo pipefail
cd "$(dirname "$0")/.."
source ./env.sh
ruff format --check .
ruff check .
python3 -m pytest "$@"
