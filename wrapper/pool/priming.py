"""Recorded requests, run on a new worker before its first real one, so that this finds compiled code.

Owns which recorded requests a worker may be primed with, their files' way in and out of its execroot, and
what their answers mean. An answer with an exit code other than 0 is only counted. A request that a worker
died of, or did not come back from, is never run again by this process.

Without an execroot of its own a worker would write the outputs into its host's real tree: such a worker is
never primed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

from wrapper.errors import RequestRefused, RuntimeUnavailable, WorkerProtocolError, WrapperError
from wrapper.pool.execroots import Execroot
from wrapper.pool.settings import SETTLE_S, WarmupRules
from wrapper.pool.worker_connection import WorkerConnection
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WarmupFailed
from wrapper.recording import RecordedRequest, RecordedRequests, Tree
from wrapper.worker_protocol.messages import WorkResponse

OVERTIME_S = 5.0
"""How long a request in flight may go on when the time for the warm-up is over.

It cannot be taken back from a worker that knows no cancel, and a real request must not meet it there."""


class Recorded(NamedTuple):
    """A request, and the record file that has its files."""

    file: RecordedRequests
    request: RecordedRequest


class Group(NamedTuple):
    """Requests that are with a worker at the same time, and the files of all of them."""

    members: list[Recorded]
    file: RecordedRequests
    tree: Tree


class Priming:
    """What one pool's workers are primed with. Raises ConfigError if a record file is not in order."""

    def __init__(self, rules: WarmupRules) -> None:
        self.rules = rules
        self._deadly: set[tuple[str, int]] = set()
        self._files: list[RecordedRequests] = []
        try:
            for path in rules.requests if rules.precompile else ():
                self._files.append(RecordedRequests.load(path))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the record files. Idempotent."""
        for file in self._files:
            file.close()

    def obstacle(self, key: WorkerKey) -> str:
        """Why a worker of this key is not primed with all of the requests; empty if it is."""
        if not key.own_execroot:
            return "it has no execroot of its own, and the outputs would go into its host's tree"
        foreign = [file for file in self._files if not self._may_see(file, key)]
        if foreign:
            return (
                f"{foreign[0].path} was recorded in trust domain {foreign[0].trust_domain!r}, and the worker "
                f"is of {key.trust_domain!r} (allow_foreign_requests)"
            )
        return ""

    def requests_for(self, key: WorkerKey) -> list[Recorded]:
        """What a worker of this key is primed with, in order."""
        if not key.own_execroot:
            return []
        return [
            Recorded(file, request)
            for file in self._files
            if self._may_see(file, key)
            for request in file.requests
            if (file.path, request.number) not in self._deadly
        ]

    def never_again(self, group: Group) -> None:
        """A worker did not survive these."""
        self._deadly.update((member.file.path, member.request.number) for member in group.members)

    def _may_see(self, file: RecordedRequests, key: WorkerKey) -> bool:
        return self.rules.allow_foreign_requests or file.trust_domain == key.trust_domain


def groups_of(requests: list[Recorded], at_once: int) -> Iterator[Group]:
    """Cut into groups of at most `at_once` requests whose files can stand side by side."""
    group: Group | None = None
    for recorded in requests:
        if group is not None and len(group.members) < at_once and group.file is recorded.file:
            both = group.tree.united_with(recorded.request.tree)
            if both is not None:
                group = Group([*group.members, recorded], group.file, both)
                continue
        if group is not None:
            yield group
        group = Group([recorded], recorded.file, recorded.request.tree)
    if group is not None:
        yield group


class PrimingRun:
    """The priming of one worker. `ended_early` says why it did not come to its end; empty: it did."""

    def __init__(
        self,
        priming: Priming,
        key: WorkerKey,
        connection: WorkerConnection,
        execroot: Execroot,
        *,
        at_once: int,
        now: Callable[[], float],
        deadline: float,
    ) -> None:
        self._priming = priming
        self._requests = priming.requests_for(key)
        self._connection = connection
        self._execroot = execroot
        self._at_once = at_once
        self._now = now
        self._deadline = deadline
        self._serial = 0
        self.answered = 0
        self.failed = 0
        """Of the answered ones: those with another exit code than 0."""
        self.ended_early = ""

    async def run(self, is_in_the_way: Callable[[], bool]) -> None:
        """Run the requests. `is_in_the_way` is asked after each batch whether to leave it at that.

        Raises WarmupFailed.
        """
        since_look = self._priming.rules.batch_size
        for group in groups_of(self._requests, self._at_once):
            if since_look >= self._priming.rules.batch_size:
                since_look = 0
                if is_in_the_way():
                    self.ended_early = "a request waits"
                    return
            if self._now() >= self._deadline:
                self.ended_early = "max_warmup_ms is over"
                return
            try:
                await self._run_group(group)
            except RequestRefused as error:
                self.ended_early = f"its files cannot be staged: {error.message}"
                return
            since_look += len(group.members)

    async def _run_group(self, group: Group) -> None:
        self._serial += 1
        try:
            scratch = self._execroot.scratch(self._serial)
        except OSError as error:
            raise RequestRefused(f"no scratch directory can be made: {error}") from error
        try:
            try:
                await _in_thread(lambda: group.file.write_tree(group.tree, scratch.path))
            except RuntimeUnavailable as error:  # a full disk: nothing of it has reached the worker
                raise RequestRefused(error.message) from error
            try:
                staged = scratch.stage()
            except RuntimeUnavailable as error:
                raise WarmupFailed(StopReason.UNCLEAN, error) from error
            try:
                await self._exchange(group)
                self._connection.process.kill_stragglers()
            except BaseException:
                staged.abandon()
                raise
            try:
                staged.collect()
            except RuntimeUnavailable as error:
                raise WarmupFailed(StopReason.UNCLEAN, error) from error
        finally:
            await _in_thread(scratch.remove)

    async def _exchange(self, group: Group) -> None:
        """Send the requests and wait for their answers; afterwards the worker is silent."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[WorkResponse | WrapperError]] = []
        for member in group.members:
            answer: asyncio.Future[WorkResponse | WrapperError] = loop.create_future()
            try:
                self._connection.request(member.request.request(), _setter(answer))
            except RequestRefused:  # it cannot be put into the tool's format
                self.failed += 1
                continue
            except WrapperError as error:
                self._priming.never_again(group)
                raise WarmupFailed(StopReason.CRASH, error) from error
            answers.append(answer)
        patience_s = max(0.0, self._deadline - self._now()) + OVERTIME_S
        try:
            if answers:
                await asyncio.wait(answers, timeout=patience_s)
        except asyncio.CancelledError:
            if self._connection.lost is not None:  # it died, and is being stopped for that
                self._priming.never_again(group)
            raise
        for answer in answers:
            self._note(answer, group, patience_s)
        if self._connection.exchange.echoes_ids is False:
            await asyncio.sleep(SETTLE_S)
        if not self._connection.is_silent():
            said = "the worker said something that nobody asked for while it was primed"
            raise WarmupFailed(StopReason.STRAY_OUTPUT, self._connection.lost or WorkerProtocolError(said))

    def _note(
        self, answer: asyncio.Future[WorkResponse | WrapperError], group: Group, patience_s: float
    ) -> None:
        if not answer.done():
            self._priming.never_again(group)
            numbers = ", ".join(str(member.request.number) for member in group.members)
            text = f"recorded request {numbers} of {group.file.path} was not answered within {patience_s:g} s"
            tail = self._connection.process.stderr_tail()
            raise WarmupFailed(StopReason.WARMUP_FAILED, WorkerProtocolError(text, stderr_tail=tail))
        outcome = answer.result()
        if isinstance(outcome, WrapperError):
            self._priming.never_again(group)
            raise WarmupFailed(StopReason.CRASH, outcome)
        self.answered += 1
        self.failed += outcome.pb.exit_code != 0


def _setter(
    answer: asyncio.Future[WorkResponse | WrapperError],
) -> Callable[[WorkResponse | WrapperError], None]:
    def on_answer(outcome: WorkResponse | WrapperError) -> None:
        if not answer.done():
            answer.set_result(outcome)

    return on_answer


async def _in_thread(work: Callable[[], None]) -> None:
    """Copying and deleting trees takes time that the loop's other requests must not lose.

    A cancel waits for the thread: what it makes is to be removed by whoever called this.
    """
    job = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        if not job.cancelled():
            job.exception()  # whoever cancels does not want to hear of it
        raise
