"""What the demo compiles: real library sources, the class path for them, and the actions they are cut into.

Owns fetching, the JDK's whereabouts and everything under `.cache/demo`. Knows nothing of workers or timing.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / ".cache" / "demo"

LIBRARY = "org.apache.commons:commons-lang3:3.17.0"
SOURCES_JAR = "commons-lang3-3.17.0-sources.jar"
SOURCES_SHA256 = "5fdcac21ad329766054a95367d7583dfcdca737d221d5e01a5f2a198c04c6b18"
COPY_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"

MINIMUM_JDK = 11
COMMON_FLAGS = ("-proc:none", "-implicit:none", "-nowarn", "-Xlint:none", "-encoding", "UTF-8")
OWN_VARIANTS = (("-g",), ("-g:none",), ("-parameters",), ("-g", "-parameters", "--release", "11"))
"""Flags with which each of the repository's own sources is compiled, to have enough actions of them."""

Say = Callable[[str], None]


class DemoError(Exception):
    """The demo cannot run; the text says what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Jdk:
    """The programs of one JDK."""

    java: str
    javac: str
    version: str


@dataclass(frozen=True, slots=True)
class Action:
    """One compilation: javac's arguments but for the output directory, as words without white space."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DemoInput:
    """The actions, and the folder that all their paths are relative to."""

    description: str
    folder: Path
    actions: tuple[Action, ...]


def find_jdk() -> Jdk:
    """The JDK of JAVA_HOME, else of PATH. Raises DemoError if there is none, or too old a one."""
    home = os.environ.get("JAVA_HOME")
    javac = shutil.which("javac", path=f"{home}/bin" if home else None)
    if javac is None:
        where = f"JAVA_HOME ({home}) has none" if home else "there is none on PATH"
        raise DemoError(
            f"javac is missing ({where}). Debian, Ubuntu: apt-get install openjdk-17-jdk-headless "
            "(default-jdk-headless for another version); Fedora: dnf install java-latest-openjdk-devel"
        )
    java = Path(javac).resolve().with_name("java")
    if not java.exists():
        raise DemoError(f"{javac} has no java beside it ({java}); install a whole JDK")
    said = subprocess.run([javac, "-version"], check=False, capture_output=True, text=True)
    version = (said.stdout + said.stderr).strip().splitlines()[-1:] or ["nothing"]
    number = version[0].removeprefix("javac ").partition(".")[0].partition("-")[0]
    if said.returncode != 0 or not number.isdigit() or int(number) < MINIMUM_JDK:
        raise DemoError(
            f"{javac} is no JDK {MINIMUM_JDK} or newer; it says: {version[0]}. "
            "Debian, Ubuntu: apt-get install openjdk-17-jdk-headless"
        )
    return Jdk(str(java), javac, version[0])


def worker_jar(jdk: Jdk) -> Path:
    """The example worker, compiled into a jar that is named after its sources and this JDK."""
    sources = sorted((HERE / "src").rglob("*.java"))
    digest = hashlib.sha256(jdk.version.encode())
    for source in sources:
        digest.update(source.read_bytes())
    jar = CACHE / f"java-worker-{digest.hexdigest()[:16]}.jar"
    if not jar.exists():
        classes = _empty(CACHE / f"worker-classes.{os.getpid()}")
        _javac(jdk, ["--release", str(MINIMUM_JDK), "-d", str(classes), *map(str, sources)], HERE)
        _write_jar(jar, classes, main_class="javaworker.Main")
        shutil.rmtree(classes)
    return jar


def prepare(choice: str, actions_wanted: int, jdk: Jdk, say: Say) -> DemoInput:
    """Lay out sources and class path, and cut the sources into actions.

    `choice` is "maven", "own", or "auto": the library if Maven can get it, else the repository's own.
    """
    if choice != "own":
        try:
            return _library_input(actions_wanted, jdk, say)
        except DemoError as error:
            if choice == "maven":
                raise
            say(f"{error}\nGoing on with the repository's own small set of sources.")
    return _own_input(actions_wanted, jdk, say)


def _library_input(actions_wanted: int, jdk: Jdk, say: Say) -> DemoInput:
    jar = _sources_jar(say)
    folder = CACHE / f"library-{SOURCES_SHA256[:12]}"
    if not (folder / "src").is_dir():
        half_made = _empty(CACHE / f"library.{os.getpid()}")
        with zipfile.ZipFile(jar) as archive:
            archive.extractall(
                half_made / "src", [name for name in archive.namelist() if name.endswith(".java")]
            )
        _into_place(half_made, folder)
    sources = sorted(
        path.relative_to(folder)
        for path in (folder / "src").rglob("*.java")
        if path.stem not in ("package-info", "module-info")
    )
    class_path = _class_path(folder, sources, jdk, say)
    count = min(actions_wanted, len(sources))
    actions = []
    for number in range(count):
        # Sizes that differ by one at the most, and every source in exactly one action.
        part = sources[number * len(sources) // count : (number + 1) * len(sources) // count]
        if actions_wanted < len(sources) // 3:
            part = part[:3]  # a short run takes a sample of small actions, not a few large ones
        actions.append(_action(part[0].stem, (), class_path, part))
    return DemoInput(f"{LIBRARY} ({len(sources)} sources)", folder, tuple(actions))


def _own_input(actions_wanted: int, jdk: Jdk, say: Say) -> DemoInput:
    origin = HERE / "sources"
    paths = sorted(origin.rglob("*.java"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:12]
    folder = CACHE / f"own-{digest}"
    if not folder.is_dir():
        half_made = _empty(CACHE / f"own.{os.getpid()}")
        shutil.copytree(origin, half_made / "src")
        _into_place(half_made, folder)
    sources = [Path("src") / path.relative_to(origin) for path in paths]
    class_path = _class_path(folder, sources, jdk, say)
    actions = [
        _action(f"{source.stem} {' '.join(flags)}", flags, class_path, [source])
        for flags in OWN_VARIANTS
        for source in sources
    ]
    description = f"the repository's own {len(sources)} sources, in {len(OWN_VARIANTS)} variants of flags"
    return DemoInput(description, folder, tuple(actions[:actions_wanted]))


def _action(name: str, flags: Sequence[str], class_path: Path, sources: Sequence[Path]) -> Action:
    arguments = (*COMMON_FLAGS, *flags, "-cp", str(class_path), *map(str, sources))
    return Action(name, arguments)


def _sources_jar(say: Say) -> Path:
    jar = CACHE / SOURCES_JAR
    if not jar.exists():
        maven = shutil.which("mvn")
        if maven is None:
            raise DemoError(f"Maven is missing, so {LIBRARY} cannot be fetched: apt-get install maven")
        say(f"Fetching the sources of {LIBRARY} with Maven …")
        folder = _empty(CACHE / f"maven.{os.getpid()}")
        # Maven keeps what it fetches in the home directory; a service account may have none.
        home_is_ours = os.access(pwd.getpwuid(os.getuid()).pw_dir, os.W_OK)
        repository = [] if home_is_ours else [f"-Dmaven.repo.local={CACHE / 'maven-repository'}"]
        done = subprocess.run(
            [
                maven,
                "-B",
                "-q",
                "-Dstyle.color=never",
                *repository,
                COPY_GOAL,
                f"-Dartifact={LIBRARY}:jar:sources",
                f"-DoutputDirectory={folder}",
            ],
            check=False,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 or not (folder / SOURCES_JAR).exists():
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[:5])
            shutil.rmtree(folder)
            raise DemoError(f"Maven could not fetch {LIBRARY}:\n{said}")
        (folder / SOURCES_JAR).rename(jar)
        shutil.rmtree(folder)
    digest = hashlib.sha256(jar.read_bytes()).hexdigest()
    if digest != SOURCES_SHA256:
        raise DemoError(
            f"{jar} is not what it should be: SHA-256 {digest}, expected {SOURCES_SHA256}; delete it"
        )
    return jar


def _class_path(folder: Path, sources: Sequence[Path], jdk: Jdk, say: Say) -> Path:
    """The whole library compiled once: every action then compiles on its own, against this."""
    # An older JDK cannot read the classes of a newer one.
    jar = folder / f"library-{jdk.version.split()[-1]}.jar"
    if not jar.exists():
        say(f"Compiling {len(sources)} sources once, for the class path …")
        classes = _empty(folder / f"classes.{os.getpid()}")
        _javac(jdk, [*COMMON_FLAGS, "-d", str(classes), *map(str, sources)], folder)
        _write_jar(jar, classes)
        shutil.rmtree(classes)
    return jar.relative_to(folder)


def _javac(jdk: Jdk, arguments: Sequence[str], cwd: Path) -> None:
    done = subprocess.run([jdk.javac, *arguments], check=False, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise DemoError(
            f"javac failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )


def _write_jar(jar: Path, classes: Path, main_class: str = "") -> None:
    manifest = "Manifest-Version: 1.0\r\n" + (f"Main-Class: {main_class}\r\n" if main_class else "") + "\r\n"
    half_made = jar.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(half_made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/MANIFEST.MF", manifest)
        for path in sorted(classes.rglob("*.class")):
            archive.write(path, path.relative_to(classes))
    half_made.rename(jar)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _into_place(half_made: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    half_made.rename(folder)
