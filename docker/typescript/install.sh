#!/bin/sh
# Fills ROOT/opt with TypeScript, the worker and the warm-up script. The Dockerfile runs it for "/"; the tests for a
# folder that becomes an image without a registry. Needs npm, and the packages of package-lock.json.
#
#   install.sh ROOT
set -eu

[ $# = 1 ] || { echo 'usage: install.sh ROOT' >&2; exit 64; }
root=${1%/}
here=$(cd "$(dirname "$0")" && pwd)

mkdir -p "$root/opt/typescript-worker" "$root/opt/warmup/typescript"
cp "$here/package.json" "$here/package-lock.json" "$here/typescript_worker.js" "$root/opt/typescript-worker"
(cd "$root/opt/typescript-worker" && npm ci --ignore-scripts --no-audit --no-fund)
install -m 755 "$here/node-warmup.sh" "$root/opt/warmup/node-warmup.sh"
cp "$here/node_warmup.js" "$here/../../wrapper/runtime/node_gc_agent.js" "$root/opt/warmup"
cp "$here"/warmup/*.ts "$root/opt/warmup/typescript"
chmod -R a+rX "$root/opt/typescript-worker" "$root/opt/warmup"
