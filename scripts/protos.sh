#!/bin/bash
# Generates the Python stubs of every protos/*/v1/*.proto below DIRECTORY (default: this tree's
# root), with the pinned compiler and plugins of .venv.
#
#   scripts/protos.sh [DIRECTORY]
#
# tests/lint/test_protos_fresh.py runs it into an empty directory and compares.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
bin=$PWD/.venv/bin
# The repository root is the include root, so `from protos.agent.v1 import agent_pb2` works as it
# stands; async stubs only, for we write no synchronous client.
"$bin/python" -m grpc_tools.protoc -I. \
    --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
    --python_out="$out" --grpc_python_out="$out" \
    --mypy_out="$out" --mypy_grpc_out=only_async:"$out" \
    protos/*/v1/*.proto
