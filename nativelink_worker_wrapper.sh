#!/usr/bin/env bash
# Runs a NativeLink worker node with warm workers: the pool daemon, then the NativeLink worker, and stops both in
# order. See usage() below and docs/nativelink.md.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'END'
usage: nativelink_worker_wrapper.sh --scheduler-endpoint URL [options]

Starts the pool daemon, waits until its minimum of warm workers is ready, writes the configuration of a NativeLink
worker for this node, and starts that. SIGTERM and SIGINT stop first NativeLink, then the daemon.

  --scheduler-endpoint URL  of the scheduler's worker API: http://HOST:50052 or grpc://HOST:50052
  --cas-endpoint URL        of CAS and AC (default: port 50051 of the scheduler's host)
  --config FILE             the pools (default: /etc/nativelink/pools.json5)
  --data-dir DIR            for NativeLink's work and CAS folders (default: /var/lib/nativelink)
  --run-dir DIR             for sockets and what is generated (default: /run/nativelink_worker_wrapper)
  --name NAME               of the worker, to the scheduler (default: this host's name)
  --advertise-keys          tell the scheduler which persistentWorkerKeys the pools serve
  --ready-timeout SECONDS   how long to wait for the warm workers (default: 300)
  --write-only              write the configuration, say where it is, and stop
  --help

NATIVELINK names the program, if it is not `nativelink` on the PATH; NATIVELINK_WORKER_WRAPPER ours.
exit codes: that of nativelink; 64 wrong usage; 69 a program is missing; 75 the workers are not ready in time; 78 wrong
configuration.
END
}

say() { printf 'nativelink_worker_wrapper.sh: %s\n' "$*" >&2; }
wrong() { say "$* (--help explains)"; exit 64; }

scheduler='' cas='' config=/etc/nativelink/pools.json5 data_dir=/var/lib/nativelink
run_dir=/run/nativelink_worker_wrapper name=$(uname -n)- advertise='' ready_timeout=300 write_only=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --advertise-keys) advertise=--advertise-keys ;;
    --write-only) write_only=1 ;;
    --scheduler-endpoint=* | --cas-endpoint=* | --config=* | --data-dir=* | --run-dir=* | --name=* | --ready-timeout=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --scheduler-endpoint | --cas-endpoint | --config | --data-dir | --run-dir | --name | --ready-timeout)
      [ $# -ge 2 ] || wrong "$1 wants a value"
      case $1 in
        --scheduler-endpoint) scheduler=$2 ;;
        --cas-endpoint) cas=$2 ;;
        --config) config=$2 ;;
        --data-dir) data_dir=$2 ;;
        --run-dir) run_dir=$2 ;;
        --name) name=$2 ;;
        --ready-timeout) ready_timeout=$2 ;;
      esac
      shift ;;
    *) wrong "unknown argument '$1'" ;;
  esac
  shift
done
[ -n "$scheduler" ] || wrong "--scheduler-endpoint is missing"

wrapper=${NATIVELINK_WORKER_WRAPPER:-}
if [ -z "$wrapper" ]; then
  if [ -x "$here/.venv/bin/nativelink_worker_wrapper" ]; then
    wrapper=$here/.venv/bin/nativelink_worker_wrapper
  else
    wrapper=nativelink_worker_wrapper
  fi
fi
command -v "$wrapper" >/dev/null || {
  say "there is no program $wrapper: tools/bootstrap.sh makes it in a checkout, pip install . elsewhere"
  exit 69
}
nativelink=${NATIVELINK:-nativelink}
if [ -z "$write_only" ] && ! command -v "$nativelink" >/dev/null; then
  say "there is no program $nativelink on the PATH. NativeLink is built with cargo or Bazel from its repository
  (github.com/TraceMachina/nativelink), or comes as a container image; NATIVELINK=/path/to/nativelink names it here."
  exit 69
fi

mkdir -p "$run_dir" "$data_dir" || exit 78
socket=$run_dir/pool.sock
"$wrapper" node-config --template "$here/nativelink-config.json" --output-dir "$run_dir" --pools "$config" \
  --scheduler-endpoint "$scheduler" ${cas:+--cas-endpoint "$cas"} --data-dir "$data_dir" --name "$name" \
  --socket "$socket" $advertise || exit
[ -z "$write_only" ] || exit 0

daemon=0 worker=0 stopping=''
start_daemon() { "$wrapper" serve --config "$config" --socket "$socket" </dev/null & daemon=$!; }
stop() {
  stopping=1
  if [ $worker != 0 ]; then kill -TERM $worker 2>/dev/null; else [ $daemon = 0 ] || kill -TERM $daemon 2>/dev/null; fi
}
trap stop TERM INT
trap '[ $daemon = 0 ] || kill -HUP $daemon 2>/dev/null' HUP

# `wait` ends at a signal that has a trap: only a process that is gone has an exit code.
wait_for() {
  local code
  while :; do
    wait "$1"; code=$?
    kill -0 "$1" 2>/dev/null || return $code
  done
}

end_daemon() {
  [ $daemon = 0 ] && return
  kill -TERM $daemon 2>/dev/null
  wait_for $daemon
}

start_daemon
"$wrapper" wait-ready --socket "$socket" --timeout "$ready_timeout" & ready=$!
wait_for_ready() {
  local code
  while kill -0 $ready 2>/dev/null; do
    if [ -n "$stopping" ] || ! kill -0 $daemon 2>/dev/null; then kill $ready 2>/dev/null; fi
    wait -n $ready $daemon; code=$?
  done
  wait $ready
}
wait_for_ready; code=$?
if [ $code != 0 ]; then
  if [ -n "$stopping" ]; then code=0; elif ! kill -0 $daemon 2>/dev/null; then wait $daemon; code=$?; fi
  end_daemon
  exit $code
fi

"$nativelink" "$run_dir/nativelink.json" & worker=$!
while kill -0 $worker 2>/dev/null; do
  wait -n $worker $daemon
  if [ -z "$stopping" ] && ! kill -0 $daemon 2>/dev/null && kill -0 $worker 2>/dev/null; then
    say "the pool daemon has ended; actions run without workers until it is back"
    sleep 1
    start_daemon
  fi
done
wait_for $worker; code=$?
end_daemon
exit $code
