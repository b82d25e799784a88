#!/usr/bin/env python3
"""Gets JavaBuilder, the worker that real Bazel compiles Java with, and prints the path of its jar.

It comes in Debian's package `bazel-java-tools-data` (testing and sid only). apt fetches it from the mirror
that the system's apt already uses, with a configuration, lists and a cache of its own: nothing of the system
changes, and no root is needed. The result is kept in `.cache/`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fetching import FetchError, cached, need, run

PACKAGE = "bazel-java-tools-data"
SUITE = "sid"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
JAR_NAME = "JavaBuilder_deploy.jar"


def mirror() -> str:
    """The address from which this system's apt takes its own release's main component."""
    codename = ""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            codename = line.partition("=")[2].strip('"')
    listing = run(
        "asking apt for its mirrors",
        [
            need("apt-get", "apt"),
            "indextargets",
            "--format",
            "$(RELEASE) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ],
    )
    for line in listing.splitlines():
        release, component, address = line.split(" ", 2)
        if release in (codename, "stable", "testing", "unstable", SUITE) and component == "main":
            return address
    raise FetchError(
        f"{PACKAGE}: apt's sources name no mirror of Debian's release {codename or '?'!r}, component main; "
        "this test tool can only be had on Debian"
    )


def private_apt(folder: Path, address: str) -> dict[str, str]:
    """Lay out a configuration for apt below `folder`; returns the environment that makes apt use it."""
    for part in ("lists/partial", "cache/archives/partial", "empty"):
        (folder / part).mkdir(parents=True)
    (folder / "status").touch()
    signed_by = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
    (folder / "suite.sources").write_text(
        f"Types: deb\nURIs: {address}\nSuites: {SUITE}\nComponents: main\n{signed_by}"
    )
    (folder / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{folder}/suite.sources";\n'
        f'Dir::Etc::sourceparts "{folder}/empty";\n'
        f'Dir::Etc::preferences "{folder}/empty/none";\n'
        f'Dir::Etc::preferencesparts "{folder}/empty";\n'
        f'Dir::State "{folder}";\n'
        f'Dir::State::lists "{folder}/lists";\n'
        f'Dir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache";\n'
        'Acquire::Languages "none";\n'
        'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";\n'
        'Acquire::Retries "3";\n'
    )
    if os.geteuid() == 0:
        # The folder may lie where apt's own unprivileged user cannot write.
        with (folder / "apt.conf").open("a") as configuration:
            configuration.write('APT::Sandbox::User "root";\n')
    return {"APT_CONFIG": str(folder / "apt.conf")}


def _make(folder: Path) -> None:
    print(f"fetching {PACKAGE} from Debian {SUITE} …", file=sys.stderr)
    apt_folder = folder / "apt"
    env = private_apt(apt_folder, mirror())
    run(f"reading Debian {SUITE}'s package lists", ["apt-get", "update"], env=env)
    run(f"fetching {PACKAGE}", ["apt-get", "download", PACKAGE], env=env, cwd=folder)
    (package,) = folder.glob("*.deb")
    run(
        f"unpacking {package.name}",
        [need("dpkg-deb", "dpkg"), "--extract", str(package), str(folder / "root")],
    )
    if not list(folder.glob(f"root/**/{JAR_NAME}")):
        raise FetchError(f"{package.name} holds no {JAR_NAME}")
    package.unlink()
    shutil.rmtree(apt_folder)


def java_builder() -> Path:
    """The path of JavaBuilder_deploy.jar, fetched unless `.cache/` has it. Raises FetchError."""
    folder = cached("java-tools", "1", _make)
    return next(iter(sorted(folder.glob(f"root/**/{JAR_NAME}"))))


if __name__ == "__main__":
    try:
        print(java_builder())
    except FetchError as error:
        sys.exit(f"fetch_java_tools: {error}")
