#!/bin/sh
# Fills ROOT/opt with a JDK cut to size, the example's Java worker, the archive of its classes, and the warm-up script.
# The Dockerfile runs it for "/"; the tests for a folder that becomes an image without a registry.
#
#   install.sh ROOT       JAVA_HOME: the JDK to take; MODULES: what of it
#
# Another ROOT than "/" must have a shell, env, and the C library and zlib: what makes the archive runs there, since an
# archive holds only for the path, size and time of the very jar that the worker runs.
set -eu

[ $# = 1 ] || { echo 'usage: install.sh ROOT' >&2; exit 64; }
root=${1%/}
here=$(cd "$(dirname "$0")" && pwd)
example=$here/../../examples/java-persistent-worker
java_home=${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}
# What sources may refer to is what the worker's own JDK has: all of Java SE, and what annotation processors ask for.
modules=${MODULES:-java.se,jdk.compiler,jdk.zipfs,jdk.unsupported,jdk.jcmd,jdk.crypto.ec,jdk.charsets}

in_root() {
  if [ -z "$root" ]; then "$@"; return; fi
  # A JVM finds its own libraries with the help of /proc. The mount is gone with its namespace.
  unshare --mount /bin/sh -c 'mount --rbind /proc "$0/proc" && exec chroot "$0" "$@"' "$root" "$@"
}

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

"$java_home/bin/jlink" --add-modules "$modules" --strip-java-debug-attributes --no-header-files --no-man-pages \
  --output "$root/opt/java"
in_root /opt/java/bin/java -Xshare:dump >"$build/log" || { cat "$build/log" >&2; exit 1; }

mkdir -p "$root/opt/java-worker" "$root/opt/warmup"
"$java_home/bin/javac" -d "$build/worker" "$example"/src/javaworker/*.java
"$java_home/bin/jar" --create --file "$root/opt/java-worker/java-worker.jar" --main-class javaworker.Main \
  -C "$build/worker" .
"$java_home/bin/javac" -d "$build/warmup" "$here/JvmWarmup.java"
"$java_home/bin/jar" --create --file "$root/opt/warmup/jvm-warmup.jar" --main-class JvmWarmup -C "$build/warmup" .
# A whole second, which every way of copying keeps.
touch -d @1000000000 "$root/opt/java-worker/java-worker.jar"
install -m 755 "$here/java-worker" "$root/opt/java-worker/java-worker"
install -m 755 "$here/jvm-warmup.sh" "$root/opt/warmup/jvm-warmup.sh"
mkdir -p "$root/opt/warmup/java"
cp -R "$example/sources/." "$root/opt/warmup/java"

# The classes to archive are those that a worker has loaded that has really compiled something.
mkdir -p "$root/opt/build"
trap 'rm -rf "$build" "$root/opt/build"' EXIT
in_root /usr/bin/env JAVA_OPTS=-XX:DumpLoadedClassList=/opt/build/classes WITHOUT_ARCHIVE=1 \
  /bin/sh /opt/warmup/jvm-warmup.sh 100
in_root /opt/java/bin/java -Xshare:dump -XX:SharedClassListFile=/opt/build/classes \
  -XX:SharedArchiveFile=/opt/java-worker/java-worker.jsa -cp /opt/java-worker/java-worker.jar >"$build/log" ||
  { cat "$build/log" >&2; exit 1; }
chmod -R a+rX "$root/opt/java" "$root/opt/java-worker" "$root/opt/warmup"
