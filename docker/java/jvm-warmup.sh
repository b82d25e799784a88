#!/bin/sh
# Starts a Java worker of its own beside the pool's and has it compile real sources, then collect its garbage.
#
#   jvm-warmup.sh [ITERATIONS]       100 to 1000; else WARMUP_ITERATIONS, else 100
#
# Exit code 0: in this container, for this user and with these JAVA_OPTS, the worker starts, compiles, uses the archive
# of its classes and collects its garbage, and what all that reads is in the node's page cache. It warms its own
# worker's compiled code, which ends with it. What warms the pool's worker are recorded requests (warmup.requests).
set -eu

iterations=${1:-${WARMUP_ITERATIONS:-100}}
case $iterations in
  '' | *[!0-9]* | ?????*) iterations=0 ;;
esac
if [ "$iterations" -lt 100 ] || [ "$iterations" -gt 1000 ]; then
  echo 'usage: jvm-warmup.sh [ITERATIONS]: 100 to 1000' >&2
  exit 64
fi

if [ -z "${WITHOUT_ARCHIVE:-}" ]; then
  # The worker itself would go on without it, slower, and say nothing.
  said=$(/opt/java/bin/java -Xshare:on -Xlog:cds -XX:SharedArchiveFile=/opt/java-worker/java-worker.jsa \
    ${JAVA_OPTS:-} -cp /opt/java-worker/java-worker.jar -version 2>&1) || {
    printf 'jvm-warmup: the archive of the classes does not go with this JVM, jar and JAVA_OPTS:\n%s\n' "$said" >&2
    exit 1
  }
fi
exec /opt/java/bin/java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx64m -jar /opt/warmup/jvm-warmup.jar \
  "$iterations" /opt/warmup/java /opt/java-worker/java-worker --persistent_worker
