"""Whether an action is a persistent worker's work, and what the worker is started with and asked for.

Owns that decision and the splitting of a command line; pure: reads no file, starts nothing. Knows nothing of
how an action arrives (`Request` is what it needs of one), of workers that exist or of flagfiles' contents.

An action is a worker's if one of these says so; a flagfile alone never does, for compilers without any
worker mode take them too:

- a tool pattern: the pool's `tools`, `actions.tools`, or the table of well-known workers (`tool_table.py`);
- the property persistentWorkerTool: a shell pattern of at most 256 characters with some text of its own,
  which matches the tool of this action (its path or base name; see `tool_names.py`);
- a persistentWorkerKey of Bazel's own making, 64 lower-case hexadecimal digits: Bazel sends it only with
  actions that support workers.

Then the command line is split as Bazel splits it: what matches `@FILE`, `-flagfile=FILE` or
`--flagfile=FILE` is the request's, all else starts the worker. At least one has to match. Unlike there, an
interpreter's own `@FILE` (`java @jvm.options -jar tool.jar`) is part of what starts it.

A pool with a `worker_command` serves the tool of that command only: an action is its work if the pool's
`tools` match, or `actions.tools` or the table do and the action's tool has the same base name as the
`worker_command`'s, or, in a pool without `tools`, persistentWorkerTool matches. Then no flagfile is needed:
the request is all that follows the action's tool, but for what the action's program keeps to itself
(`--jvm_flag=` and the like), and for the worker's own startup arguments if the action's begin with them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from typing import Protocol

from wrapper.config_actions import ToolConfig
from wrapper.config_models import Config, PoolConfig
from wrapper.flagfiles import Argument
from wrapper.patterns import LONGEST_NAME, Names, PatternIndex, names_something
from wrapper.tool_names import CommandHead, head_of
from wrapper.tool_table import KNOWN_TOOLS, Digests, KnownTool, WireProtocol

PERSISTENT_WORKER = "--persistent_worker"
MAX_TOOL_PATTERN = 256
"""A longer persistentWorkerTool, which whoever sends an action writes, is not looked at."""
MAX_SEARCHED = 64 * 1024
"""Characters of a command line that are searched for `never_warm`; a longer one is taken to match."""

_MAX_SHOWN = 100
_FLAGFILE = re.compile("(?:@|--?flagfile=)[^\n\r\x85\u2028\u2029]+")
_BAZEL_KEY = re.compile("[0-9a-f]{64}")
_LAUNCHER_OPTION = ("--jvm_flag=", "--jvm_flags=", "--wrapper_script_flag=", "--node_options=")
"""What Bazel's start scripts for Java and Node programs take out of the command line for themselves."""


class Request(Protocol):
    """What classification needs of an action."""

    @property
    def argv(self) -> tuple[str, ...]: ...
    @property
    def key(self) -> str: ...
    @property
    def tool(self) -> str: ...
    @property
    def protocol(self) -> str: ...


@dataclass(frozen=True, slots=True)
class OneShot:
    """The action runs without a worker."""

    reason: str


@dataclass(frozen=True, slots=True)
class WorkerCall:
    """The action is a worker's work."""

    startup: tuple[str, ...]
    """What starts the worker, program first; `--persistent_worker` is not in it, unless the pool's own
    `worker_command`, which is taken as it is written, has it."""
    arguments: tuple[Argument, ...]
    protocol: WireProtocol | None
    """None: not known."""
    digests: Digests
    tool: str
    """What recognised it: a pattern, the name of an entry of the table, or the tool's own name."""
    why: str


@dataclass(frozen=True, slots=True)
class _Recognised:
    """What says that an action is a worker's."""

    tool: str
    why: str
    protocol: WireProtocol | None = None
    digests: Digests = "auto"


class ActionRules:
    """What of a configuration decides about actions, compiled once."""

    def __init__(
        self, pools: Sequence[PoolConfig], tools: Sequence[ToolConfig], never_warm: Sequence[str]
    ) -> None:
        self.never_warm = PatternIndex(never_warm)
        self.tools = ToolIndex(tools, "actions.tools")
        self.max_timeout_s: float | None = None
        self._pool_of_place = tuple(pool for pool in pools for _ in pool.keys)
        self._keys = PatternIndex([pattern for pool in pools for pattern in pool.keys])
        self._of_pool = {pool.name: PoolRules(pool) for pool in pools}

    @classmethod
    def from_config(cls, config: Config) -> ActionRules:
        rules = cls(config.pools, config.actions.tools, config.actions.never_warm)
        rules.max_timeout_s = config.actions.max_timeout_s
        return rules

    def pool_for(self, key: str) -> PoolConfig | None:
        """The first pool, in the document's order, one of whose patterns matches; None if none does."""
        place = self._keys.first(Names((key,)))
        return None if place is None else self._pool_of_place[place]

    def of_pool(self, pool: PoolConfig) -> PoolRules:
        return self._of_pool[pool.name]


class ToolIndex:
    """A list of tools of the configuration, or the table."""

    __slots__ = ("_index", "_recognised")

    def __init__(self, tools: Sequence[ToolConfig | KnownTool], where: str) -> None:
        self._recognised: list[_Recognised] = []
        patterns: list[str] = []
        for tool in tools:
            if isinstance(tool, KnownTool):
                found = _Recognised(
                    tool.name, f"a well-known worker, {tool.name}", tool.protocol, tool.digests
                )
                patterns += tool.patterns
                self._recognised += [found] * len(tool.patterns)
            else:
                why = f"{where} has {tool.pattern!r}"
                patterns.append(tool.pattern)
                self._recognised.append(_Recognised(tool.pattern, why, tool.protocol, tool.digests))
        self._index = PatternIndex(patterns)

    def find(self, names: Names) -> _Recognised | None:
        place = self._index.first(names)
        return None if place is None else self._recognised[place]


class PoolRules:
    """What of one pool decides about actions."""

    __slots__ = ("own_arguments", "own_name", "pool", "tools")

    def __init__(self, pool: PoolConfig) -> None:
        self.pool = pool
        self.tools = ToolIndex(pool.tools, f"pool {pool.name}")
        self.own_name = ""
        """What the tool of the pool's own command is called: its base name, or main class."""
        self.own_arguments: tuple[str, ...] = ()
        """The startup arguments of the pool's own command, after its tool."""
        if pool.worker_command:
            head = head_of(pool.worker_command)
            self.own_name = head.names[-1]
            rest = pool.worker_command[head.length :]
            self.own_arguments = tuple(one for one in rest if one != PERSISTENT_WORKER)


_TABLE = ToolIndex(KNOWN_TOOLS, "the table")


def classify(request: Request, rules: ActionRules) -> WorkerCall | OneShot:
    """What is to be done with an action."""
    pool = rules.pool_for(request.key)
    if pool is None:
        return OneShot(f"no pool serves persistentWorkerKey {_shown(request.key)}")
    argv = request.argv
    if not argv:
        return OneShot("the command line is empty")
    if PERSISTENT_WORKER in argv:
        return OneShot(f"the command line has {PERSISTENT_WORKER} itself")
    head = head_of(argv)
    if head.is_hidden:
        return OneShot(f"what {_shown(argv[0])} runs is not to be seen in the command line")
    recognised = _recognise(request, head, rules, pool)
    if isinstance(recognised, OneShot):
        return recognised
    if pool.worker_command:
        startup, arguments = _for_own_command(argv, head, rules.of_pool(pool))
    else:
        startup, arguments = _split(argv, head)
        if not arguments:
            return OneShot("no argument is a flagfile (@FILE or --flagfile=FILE), of which requests are made")
    if any(not argument.expand and not _is_utf8(argument.text) for argument in arguments):
        return OneShot("an argument is not UTF-8, which the worker protocol cannot express")
    if rules.never_warm.patterns:
        found = _never_warm(request, rules.never_warm)
        if found is not None:
            return OneShot(found)
    return _call(request, pool, startup, arguments, recognised)


def is_warm(request: Request, fraction: float) -> bool:
    """Whether an action is among this fraction of all. The same one always is, or never."""
    if fraction >= 1:
        return True
    digest = hashlib.sha256()
    for text in (request.key, *request.argv):
        data = text.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return int.from_bytes(digest.digest()[:8], "big") < fraction * 2**64


# ---- what makes an action a worker's -------------------------------------------------------------------


def _recognise(
    request: Request, head: CommandHead, rules: ActionRules, pool: PoolConfig
) -> _Recognised | OneShot:
    """What recognised the tool first, with all that is known of it, the most particular first."""
    names = Names(head.names)
    of_pool = rules.of_pool(pool)
    by_pool = of_pool.tools.find(names)
    by_tools = rules.tools.find(names)
    by_table = _TABLE.find(names)
    by_property = _by_property(request.tool, head)
    by_key = None
    if _BAZEL_KEY.fullmatch(request.key):
        by_key = _Recognised(head.names[-1], "Bazel made its persistentWorkerKey")
    if pool.worker_command:
        first = by_pool
        if first is None and head.names[-1] == of_pool.own_name:
            first = by_tools or by_table
        if first is None and not pool.tools:
            first = by_property
        if first is None:
            return OneShot(
                f"{_shown(head.names[-1])} is not known to be the tool of the worker_command of pool "
                f"{pool.name}; if it is, add it to the pool's tools"
            )
    else:
        first = by_pool or by_tools or by_table or by_property or by_key
        if first is None:
            return OneShot(f"{_shown(head.names[-1])} is not known to be a persistent worker")
    known = [one for one in (by_pool, by_tools, by_table) if one is not None]
    protocols = [one.protocol for one in known if one.protocol is not None]
    digests = [
        *(one.digests for one in (by_pool, by_tools) if one is not None),
        pool.digests,
        *(one.digests for one in (by_table,) if one is not None),
    ]
    return replace(
        first,
        protocol=next(iter(protocols), None),
        digests=next((choice for choice in digests if choice != "auto"), "auto"),
    )


def _by_property(pattern: str, head: CommandHead) -> _Recognised | None:
    if not pattern or len(pattern) > MAX_TOOL_PATTERN or not names_something(pattern):
        return None
    if pattern not in head.names:
        match = _compiled(pattern).match
        if not any(match(name) for name in Names(head.names).names):
            return None
    return _Recognised(head.names[-1], f"persistentWorkerTool is {_shown(pattern)}")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _never_warm(request: Request, patterns: PatternIndex) -> str | None:
    """Why this action must not go to a worker; None: no pattern says so."""
    texts = (request.key, *request.argv)
    if sum(map(len, texts)) > MAX_SEARCHED or max(map(len, texts)) > LONGEST_NAME:
        return "the command line is too long to be searched for the patterns of never_warm"
    place = patterns.first(Names(texts))
    return None if place is None else f"never_warm has {patterns.patterns[place]!r}"


# ---- splitting the command line ------------------------------------------------------------------------


def _split(argv: tuple[str, ...], head: CommandHead) -> tuple[tuple[str, ...], tuple[Argument, ...]]:
    """As Bazel does: flagfiles are the request's, the rest starts the worker."""
    startup = list(argv[: head.length])
    arguments: list[Argument] = []
    for text in argv[head.length :]:
        if _FLAGFILE.fullmatch(text):
            arguments.append(Argument.of(text))
        else:
            startup.append(text)
    return tuple(startup), tuple(arguments)


def _for_own_command(
    argv: tuple[str, ...], head: CommandHead, of_pool: PoolRules
) -> tuple[tuple[str, ...], tuple[Argument, ...]]:
    rest = tuple(text for text in argv[head.length :] if not text.startswith(_LAUNCHER_OPTION))
    own = of_pool.own_arguments
    if rest[: len(own)] == own:
        rest = rest[len(own) :]
    return of_pool.pool.worker_command, tuple(Argument.of(text) for text in rest)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= _MAX_SHOWN else ascii(text[:_MAX_SHOWN]) + "..."


def _call(
    request: Request,
    pool: PoolConfig,
    startup: tuple[str, ...],
    arguments: tuple[Argument, ...],
    recognised: _Recognised,
) -> WorkerCall:
    why = recognised.why
    protocol = recognised.protocol
    if pool.worker_command:
        protocol = pool.worker_protocol
    elif request.protocol == "proto":
        protocol = "proto"
    elif request.protocol == "json":
        protocol = "json"
    elif request.protocol:
        why += f"; persistentWorkerProtocol {_shown(request.protocol)} is neither proto nor json: ignored"
    return WorkerCall(startup, arguments, protocol, recognised.digests, recognised.tool, why)
