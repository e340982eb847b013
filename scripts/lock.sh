#!/bin/bash
# Writes requirements.lock: exact versions and hashes of what pyproject.toml asks for, for every
# Python from 3.11 on. Versions already locked are kept unless UPGRADE=1. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || { echo "lock: needs uv (pip install uv)" >&2; exit 1; }
upgrade=()
if [ -n "${UPGRADE:-}" ]; then upgrade=(--upgrade); fi
export SSL_CERT_FILE="${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}"
"$uv" pip compile pyproject.toml --group dev "${upgrade[@]}" \
    --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
    --output-file requirements.lock "$@"
grep -c '^[a-zA-Z0-9].*==' requirements.lock | sed 's/$/ packages locked/'
