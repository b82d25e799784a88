#!/bin/sh
# Starts a TypeScript worker of its own beside the pool's and has it compile real sources, then collect its garbage.
#
#   node-warmup.sh [ITERATIONS]      100 to 1000; else WARMUP_ITERATIONS, else 100
#
# Exit code 0: in this container, for this user and with these NODE_OPTIONS, the worker starts, compiles and collects
# its garbage when told to, and what all that reads is in the node's page cache. It warms its own worker's compiled
# code, which ends with it. What warms the pool's worker are recorded requests (warmup.requests).
set -eu

iterations=${1:-${WARMUP_ITERATIONS:-100}}
case $iterations in
  '' | *[!0-9]* | ?????*) iterations=0 ;;
esac
if [ "$iterations" -lt 100 ] || [ "$iterations" -gt 1000 ]; then
  echo 'usage: node-warmup.sh [ITERATIONS]: 100 to 1000' >&2
  exit 64
fi
unset NLWW_NODE_GC_FIFO # the pool listens there to its own worker
exec node /opt/warmup/node_warmup.js "$iterations" /opt/warmup/typescript \
  /opt/typescript-worker/typescript_worker.js --persistent_worker
