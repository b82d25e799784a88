"""The part of the pools document about actions: where they come from, and which of them are for workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, StringConstraints

from wrapper.config_fields import Allowed, Section, Text, TimeOrNever, YesNo

DigestsChoice = Annotated[
    Literal["auto", "always", "never"],
    Allowed('"auto", "always" or "never"', ("auto", "always", "never")),
]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]+$")]


class ToolConfig(Section):
    """A tool that is a persistent worker."""

    pattern: Annotated[
        Text,
        StringConstraints(max_length=4096),
        Allowed('a pattern of the tool\'s path, base name, JAR or main class, for example "scalac_worker"'),
    ]
    protocol: Annotated[
        Literal["proto", "json"] | None,
        Allowed('"proto", "json", or null to find out', ("proto", "json")),
    ] = None
    digests: DigestsChoice = "auto"


Tools = Annotated[tuple[ToolConfig, ...], Allowed('a list of tools, each {pattern: "scalac_worker"}')]


class WorkRootConfig(Section):
    """A directory in which a host of actions makes one for each."""

    path: Annotated[AbsolutePath, Allowed("an absolute path, NativeLink's work_directory")]
    trust_domain: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,63}$"),
        Allowed("up to 63 letters, digits, '.', '_' and '-'"),
    ] = ""
    execroots: Annotated[
        AbsolutePath | None,
        Allowed("an absolute path on the same mount, outside of all work roots, or null for beside this one"),
    ] = None


class ActionsConfig(Section):
    """What the daemon does with actions, whichever pool serves them."""

    work_roots: Annotated[
        tuple[WorkRootConfig, ...],
        Field(max_length=16),
        Allowed('a list of at most 16 directories, each {path: "/var/lib/nl/work", trust_domain: "main"}'),
    ] = ()
    socket_group: Annotated[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,31}$")] | None,
        Allowed("the name of a group that may connect, or null for our own"),
    ] = None
    tools: Tools = ()
    never_warm: Annotated[
        tuple[Annotated[Text, StringConstraints(max_length=4096)], ...],
        Allowed('a list of patterns of keys and arguments, for example ["*-opt*", "--stamp"]'),
    ] = ()
    max_timeout_s: TimeOrNever = None
    max_connections: Annotated[
        int, Strict(), Field(ge=1, le=100_000), Allowed("a whole number from 1 to 100000")
    ] = 1024
    warm: YesNo = True
