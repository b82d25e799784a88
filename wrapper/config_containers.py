"""The part of the pools document about containers: isolation, and how a worker gets to see its files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, StringConstraints

from wrapper.config_fields import MEBIBYTE, Allowed, Positive, Section, Text, YesNo
from wrapper.runtime.base import NOBODY_IN_PARTICULAR, Mount, User

EXECROOTS = ".nativelink_worker_wrapper"
"""The folder in a work root below which the workers' own execroots are."""


class MountConfig(Section):
    """Something of the node that a pool's containers may read."""

    host_path: Annotated[Text, StringConstraints(pattern=r"^/"), Allowed("an absolute path of the node")]
    path: Annotated[
        Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$")] | None,
        Allowed("an absolute path in the container, or null for the same as host_path"),
    ] = None

    def mount(self) -> Mount:
        return Mount(self.host_path, self.path or self.host_path)


class IsolationConfig(Section):
    """What keeps a container's worker from all else. Each one can be switched off, by its name."""

    run_as_user: Annotated[
        Annotated[int, Strict(), Field(ge=1, le=4_294_967_294)] | None,
        Allowed("a user's number, not 0 (root could overwrite inputs), or null for the default"),
    ] = None
    run_as_group: Annotated[
        Annotated[int, Strict(), Field(ge=1, le=4_294_967_294)] | None,
        Allowed("a group's number, not 0, or null for run_as_user's"),
    ] = None
    read_only_root: YesNo = True
    drop_capabilities: YesNo = True
    no_new_privileges: YesNo = True
    seccomp: YesNo = True
    loopback_only: YesNo = True
    memory_limit_in_bytes: Annotated[
        Annotated[int, Strict(), Field(ge=16 * MEBIBYTE, le=1 << 50)] | None,
        Allowed("a whole number of bytes from 16 MiB (16777216), or null for no limit"),
    ] = 2048 * MEBIBYTE
    pids_limit: Annotated[
        Annotated[int, Strict(), Field(ge=8, le=1_000_000)] | None,
        Allowed("a whole number from 8 to 1000000 (threads count too), or null for no limit"),
    ] = 1024
    tmp_limit_mb: Annotated[
        Positive | None, Allowed("a whole number of MiB, at least 1, or null for a folder without a limit")
    ] = 512
    mounts: Annotated[
        tuple[MountConfig, ...],
        Allowed('a list of paths of the node that may be read, each {host_path: "/opt/jdk"}'),
    ] = ()

    @property
    def uid(self) -> int:
        """The workers' user."""
        return self.run_as_user or NOBODY_IN_PARTICULAR

    def process_user(self) -> User | None:
        """Whom plain processes run as; None: ours."""
        return None if self.run_as_user is None else User(self.run_as_user, self.gid)

    @property
    def gid(self) -> int:
        """The workers' group."""
        return self.run_as_group or self.uid


class ExecrootConfig(Section):
    """How a worker gets to see the files of a request."""

    strategy: Annotated[
        Literal["rename", "link", "inplace"],
        Allowed('"rename", "link" or "inplace"', ("rename", "link", "inplace")),
    ] = "rename"
    work_root: Annotated[
        Annotated[str, StringConstraints(pattern=r"^/[^\x00]+$")] | None,
        Allowed("an absolute path below which the actions' directories are, or null"),
    ] = None
    path: Annotated[
        str,
        StringConstraints(pattern=r"^/[^\x00]+$"),
        Allowed("an absolute path, where a container's worker finds its execroot"),
    ] = "/execroot"
