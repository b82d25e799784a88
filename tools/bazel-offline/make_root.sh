#!/usr/bin/env bash
# Makes a folder with Debian's Bazel in it, and all that its rules need, so that builds run without a network.
# usage: tools/bazel-offline/make_root.sh FOLDER        (as root; a minute, 1.4 GB; nothing to do if it is there)
#
# Debian's testing and unstable carry Bazel as packages, with rules, Java tools and everything else as files. They are
# installed into a root file system of their own, from the mirror that this machine's apt uses already.
set -euo pipefail

root=${1:?usage: make_root.sh FOLDER}
stamp=$root/.complete
wanted="bazel-bootstrap bazel-java-tools bazel-rules-shell bazel-rules-python bazel-rules-java bazel-skylib
  bazel-platforms default-jdk-headless python3-pytest python3-protobuf python3-json5 python3-pydantic python3-psutil
  python3-hypothesis python3-grpcio junit4"
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

say() { printf 'make_root.sh: %s\n' "$*" >&2; }
[ "$(id -u)" = 0 ] || { say "must be root, to install packages into a root file system"; exit 1; }
command -v debootstrap >/dev/null || {
  say "installing debootstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
}
mirror=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" | grep -v -e security | head -1)
[ -n "$mirror" ] || { say "apt knows no mirror"; exit 1; }

rm -rf "$root"
mkdir -p "$root"
say "installing Debian's base system (half a minute)"
# The name of a release that this debootstrap may not know yet, made as unstable is.
debootstrap --variant=minbase forky "$root" "$mirror" sid >"$root.log" 2>&1 || { tail -20 "$root.log" >&2; exit 1; }
mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
say "installing Bazel, its rules and Java tools (half a minute)"
chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $wanted \
  >>"$root.log" 2>&1 || { tail -20 "$root.log" >&2; exit 1; }
chroot "$root" apt-get clean
printf '%s' "$wanted" >"$stamp"
say "done: $root"
