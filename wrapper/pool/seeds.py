"""The seeds of the tools that come with actions: made once for each kind of worker, bounded in number.

Knows nothing of workers but whether there is one of a key. What a seed is: `execroot/seed.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable

from wrapper.errors import RequestRefused, WrapperError
from wrapper.execroot.seed import SeedTree
from wrapper.execroot.tool_files import tool_identity
from wrapper.files import DIRECTORY
from wrapper.pool.worker_key import WorkerKey

MAX_UNUSED = 32
"""Seeds of keys without workers that are kept."""


class Seeds:
    """`folder_of`: where a key's seed is to lie, on the mount of its execroots. `in_use`: it has workers."""

    def __init__(self, folder_of: Callable[[WorkerKey], str], in_use: Callable[[WorkerKey], bool]) -> None:
        self._folder_of = folder_of
        self._in_use = in_use
        self._numbers = itertools.count(1)
        self._trees: dict[WorkerKey, SeedTree] = {}
        """In the order of their last use: the last is the most recent."""
        self._making: dict[WorkerKey, asyncio.Task[None]] = {}

    def of(self, key: WorkerKey) -> SeedTree | None:
        """What a new worker of this key is to see; None: nothing was planted, or not any more."""
        return self._trees.get(key)

    async def plant(self, key: WorkerKey, directory_fd: int) -> None:
        """See to it that there is a seed for this key, if need be of the tree in this directory.

        Raises RequestRefused if the tree has another tool now than the key says, or cannot be linked;
        what `folder_of` raises.
        """
        tree = self._trees.pop(key, None)
        if tree is not None:
            self._trees[key] = tree
            return
        making = self._making.get(key)
        if making is None:
            path = os.path.join(self._folder_of(key), f"seed-{next(self._numbers)}")
            making = asyncio.create_task(
                self._make(key, path, os.dup(directory_fd)), name=f"seed {key.label}"
            )
            self._making[key] = making
        await asyncio.shield(making)  # it is everybody's, whoever began it

    async def _make(self, key: WorkerKey, path: str, directory_fd: int) -> None:
        try:
            self._trees[key] = await asyncio.to_thread(_make_checked, key, path, directory_fd)
            unused = [other for other in self._trees if other != key and not self._in_use(other)]
            for other in unused[: max(0, len(unused) - MAX_UNUSED)]:
                await asyncio.to_thread(self._trees.pop(other).remove)
        finally:
            os.close(directory_fd)
            self._making.pop(key, None)

    async def close(self) -> None:
        """Wait for those that are being made. Their files go with the generation's folder."""
        if self._making:
            await asyncio.wait(list(self._making.values()))
        self._trees.clear()


def _make_checked(key: WorkerKey, path: str, directory_fd: int) -> SeedTree:
    try:
        tree = SeedTree.make(path, directory_fd)
    except OSError as error:
        raise RequestRefused(f"the files of the tool {key.argv[0]!r} cannot be linked: {error}") from error
    try:
        # Of the links, not of the action's tree: nobody else can change those in between.
        fd = os.open(os.path.join(path, key.working_directory), DIRECTORY)
        try:
            identity = tool_identity(fd, key.argv)
        finally:
            os.close(fd)
        if identity != key.tool:
            raise RequestRefused(f"the tool {key.argv[0]!r} was changed while it was looked at")
    except OSError as error:
        tree.remove()
        raise RequestRefused(f"the tool {key.argv[0]!r} cannot be looked at: {error}") from error
    except WrapperError:
        tree.remove()
        raise
    return tree
