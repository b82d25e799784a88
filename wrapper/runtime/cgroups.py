"""Control groups of workers' containers: a parent with a limit on processes, and what is in each.

Both hierarchies: version 2, and version 1 with one tree for each controller. Knows nothing of engines: they
put a container into the parent that they are told, and the kernel says where each process is.
"""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import dataclass, field

from wrapper.errors import RuntimeUnavailable

_NO_LIMIT = 1 << 60
"""Version 1 shows "no limit" as a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where the control groups are mounted. `unified`: version 2; `controllers`: version 1, by controller."""

    unified: str | None = None
    controllers: dict[str, str] = field(default_factory=dict)

    @property
    def roots(self) -> list[str]:
        """Every tree in which an engine may make a group."""
        found = dict.fromkeys(self.controllers.values())
        if self.unified is not None:
            found[self.unified] = None
        return list(found)

    def path(self, controller: str, groups: dict[str, str]) -> str | None:
        """The folder of a process's group for this controller, `groups` being what `groups_of` gave."""
        if controller in self.controllers and controller in groups:
            return self.controllers[controller] + groups[controller].rstrip("/")
        if self.unified is not None and "" in groups:
            return self.unified + groups[""].rstrip("/")
        return None


@functools.cache
def hierarchies() -> Hierarchies:
    """Those of this machine, read once."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def parse_mountinfo(text: str) -> Hierarchies:
    """The control groups among the mounts of /proc/PID/mountinfo."""
    unified: str | None = None
    controllers: dict[str, str] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, rest = after.partition(" ")
        point = before.split(" ")[4] if before.count(" ") >= 4 else ""
        if kind == "cgroup2" and unified is None:
            unified = point
        elif kind == "cgroup":
            for option in rest.rpartition(" ")[2].split(","):
                controllers.setdefault(option.removeprefix("name="), point)
    return Hierarchies(unified, controllers)


def groups_of(pid: int) -> dict[str, str]:
    """Controller → group of a process; under "" the one of version 2. Empty if the process is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except OSError:
        return {}
    groups: dict[str, str] = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            groups[name.removeprefix("name=")] = path
    return groups


class ParentGroup:
    """A group that an engine puts one worker's pod into: bounds how many processes it has in all.

    `name` is its absolute path in each hierarchy, made before the engine is asked.
    """

    def __init__(self, name: str, places: Hierarchies | None = None) -> None:
        self.name = name
        self._places = places or hierarchies()

    def make(self, pids_limit: int | None) -> None:
        """Make it where it can hold the limit. Raises RuntimeUnavailable if it cannot."""
        if pids_limit is None:
            return
        places = self._places
        root = places.controllers.get("pids") or places.unified
        if root is None:
            raise RuntimeUnavailable("this system has no control groups that count processes (pids)")
        try:
            if "pids" not in places.controllers:
                self._delegate(root)
            os.makedirs(root + self.name, exist_ok=True)
            _write(f"{root}{self.name}/pids.max", str(pids_limit))
        except OSError as error:
            raise RuntimeUnavailable(
                f"cannot limit a worker's processes (isolation.pids_limit): {error}; the wrapper must be "
                f"able to make control groups below {root}"
            ) from error

    def _delegate(self, root: str) -> None:
        """Version 2: a group has the files of a controller only if all above it hand that controller down."""
        path = root
        for part in self.name.strip("/").split("/"):
            for controller in ("+pids", "+memory"):
                try:
                    _write(f"{path}/cgroup.subtree_control", controller)
                except OSError:
                    if controller == "+pids":
                        raise
            path = f"{path}/{part}"
            os.makedirs(path, exist_ok=True)

    def below(self) -> list[str]:
        """Names of the groups in it, in any hierarchy."""
        found: dict[str, None] = {}
        for root in self._places.roots:
            try:
                names = os.listdir(root + self.name)
            except OSError:
                continue
            for name in names:
                if os.path.isdir(f"{root}{self.name}/{name}"):
                    found[f"{self.name}/{name}"] = None
        return list(found)

    def kill(self) -> int:
        """SIGKILL whatever runs in it or below it; returns how many processes that were.

        For a group that only workers of ours were ever put into, when the engine knows nothing of them any
        more: one that was killed while it started a container has left its first process behind.
        """
        killed = 0
        root = self._places.controllers.get("pids") or self._places.unified or ""
        for folder, _, _ in os.walk(root + self.name):
            for word in _read(f"{folder}/cgroup.procs").split():
                try:
                    os.kill(int(word), signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    continue
        return killed

    def remove(self) -> list[str]:
        """Remove it from every hierarchy; returns where it is still in use. Its own parent stays."""
        stuck = []
        for root in self._places.roots:
            path = root + self.name
            try:
                for name in os.listdir(path):  # of containers that their engine forgot
                    if os.path.isdir(f"{path}/{name}"):
                        os.rmdir(f"{path}/{name}")
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError:
                stuck.append(path)
        return stuck


class ContainerGroup:
    """The control group of one container, found by a process in it."""

    def __init__(self, pid: int, places: Hierarchies | None = None) -> None:
        places = places or hierarchies()
        groups = groups_of(pid)
        self._pids = places.path("pids", groups)
        self._memory = places.path("memory", groups)
        self._is_v1 = "memory" in places.controllers
        if self._pids is None or not os.path.isdir(self._pids):
            raise RuntimeUnavailable(
                f"the control group of process {pid}, the first of a container, is not visible here "
                f"({self._pids}); the wrapper must see the machine's control groups"
            )

    @property
    def folder(self) -> str:
        """Where its processes are listed."""
        assert self._pids is not None  # noqa: S101 - checked when it was made
        return self._pids

    def processes(self) -> list[int]:
        """The pids in it, as we see them; empty once it is gone."""
        try:
            fd = os.open(f"{self._pids}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            data = b""
            while chunk := os.read(fd, 65536):
                data += chunk
        except OSError:
            return []
        finally:
            os.close(fd)
        return sorted({int(pid) for pid in data.split()})

    def resident_bytes(self) -> int:
        """Anonymous memory of all its processes; 0 once it is gone."""
        wanted = "total_rss" if self._is_v1 else "anon"
        return self._field("memory.stat", wanted)

    def oom_kills(self) -> int:
        """How often the kernel has killed something in it for want of memory."""
        return self._field("memory.oom_control" if self._is_v1 else "memory.events", "oom_kill")

    def memory_limit_bytes(self) -> int | None:
        """None: no limit."""
        text = self._text("memory.limit_in_bytes" if self._is_v1 else "memory.max").strip()
        return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None

    def pids_limit(self) -> int | None:
        """The lowest of its own and its parent's; None: no limit."""
        limits = []
        for folder in (self._pids, os.path.dirname(self._pids or "")):
            text = _read(f"{folder}/pids.max").strip()
            if text.isdigit():
                limits.append(int(text))
        return min(limits, default=None)

    def limit_parent(self, pids_limit: int) -> None:
        """Limit the processes of the group that it lies in, made by systemd. Raises RuntimeUnavailable."""
        path = f"{os.path.dirname(self.folder)}/pids.max"
        try:
            _write(path, str(pids_limit))
        except OSError as error:
            raise RuntimeUnavailable(f"cannot limit a worker's processes (pids_limit): {error}") from error

    def _text(self, name: str) -> str:
        return _read(f"{self._memory}/{name}") if self._memory is not None else ""

    def _field(self, file: str, name: str) -> int:
        for line in self._text(file).splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == name:
                return int(words[1])
        return 0


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
