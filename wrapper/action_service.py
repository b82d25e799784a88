"""Action mode's way of a request: an action in, its outcome out.

    place → classify → key → seed → lease → stage → exchange → collect → reply

Owns the order of these, what each failure means for the action (run it without a worker, run it again, it
has failed), and the canary and kill switches. The steps themselves are elsewhere. Knows the client only
as somebody who can be told things.

The rule for failures: while the action's tree is as it came, the client can run the action as if there
were no workers at all, and is told so. Once it is not, only the host can run it again, from its inputs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from wrapper.action import ActionRules, OneShot, WorkerCall, classify, is_warm
from wrapper.action_outcome import Client
from wrapper.action_runner import Terms, run_action
from wrapper.client_protocol import ActionRequest, FailureKind
from wrapper.clock import precise_clock
from wrapper.config import Config, PoolConfig
from wrapper.errors import (
    ActionLost,
    ActionTimedOut,
    NotAWorker,
    RequestCancelled,
    RequestRefused,
    WorkerDied,
    WorkerProtocolError,
    WorkerStartFailed,
    WrapperError,
)
from wrapper.execroot.tool_files import tool_identity
from wrapper.flagfiles import NotExpressible, expand
from wrapper.input_digests import InputDigests
from wrapper.own_command import own_worker_key
from wrapper.pool.pool import WorkerPool
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.spawn import resolve_program
from wrapper.tool_records import ToolRecord, ToolRecords
from wrapper.work_roots import ActionPlace, WorkRoots
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

_OF_ONE_ACTION = {"PWD", "OLDPWD"}

_MOST_SAID = 1_000
_MOST_KEYS = 1_000

_log = logging.getLogger("nativelink_worker_wrapper")


@dataclass(frozen=True, slots=True)
class Rules:
    """What of the configuration decides about actions. Replaced as a whole when it is read again."""

    config: Config
    actions: ActionRules
    roots: WorkRoots
    own_keys: dict[tuple[str, str, str], WorkerKey | None] = field(default_factory=dict)
    """Kinds of workers of pools' own commands, by pool, trust domain and working directory."""


class WorkerLost(WrapperError):
    """A worker ended, or broke the protocol, while it had the action. The action's tree is gone."""

    retry_helps = True


class _Refused(Exception):
    """The action is not for a worker; the reason."""


class ActionService:
    """Serves actions with workers of one pool. All methods belong to the event loop's thread."""

    def __init__(self, pool: WorkerPool, rules: Rules) -> None:
        self.rules = rules
        self.is_off = ""
        """Why every action runs without a worker now (the kill switch); empty: it does not."""
        self.records = ToolRecords()
        self._pool = pool
        self._digests = InputDigests()
        self._in_use: dict[tuple[int, int], ActionPlace] = {}
        """The directories of the actions that are being served, and whose they are."""
        self._now = precise_clock()
        self._said: set[str] = set()

    async def serve(self, request: ActionRequest, cwd_fd: int, client: Client) -> None:
        """Serve one action to its end and tell the client, exactly once. `cwd_fd` stays the caller's.

        Cancelled, it returns when no process is at work for the action any more; the client is told nothing.
        """
        try:
            await self._serve(request, cwd_fd, client)
        except _Refused as refused:
            self._say_once(request, str(refused))
            client.one_shot(str(refused))
        except RequestRefused as error:
            client.failed(FailureKind.REFUSED, error.message, error.exit_code)
        except WrapperError as error:
            client.busy(error.report())
        except Exception as error:  # noqa: BLE001 - the client must be told
            _log.exception("an error of the wrapper's own")
            client.failed(FailureKind.LOST, f"an error of the wrapper's own: {error!r}")

    def _say_once(self, request: ActionRequest, reason: str) -> None:
        """Why an action runs without a worker: the first time at all events, then for who asked for all."""
        if not request.key and not request.tool:
            return
        program = request.argv[0]
        level = logging.DEBUG
        if reason not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(reason)
            level = logging.INFO
        _log.log(level, "without a worker: %s of key %r: %s", program, request.key, reason)

    async def _serve(self, request: ActionRequest, cwd_fd: int, client: Client) -> None:
        if self.is_off:
            raise _Refused(self.is_off)
        rules = self.rules
        try:
            place = rules.roots.find(cwd_fd)
        except RequestRefused as error:
            _log.warning("%s", error.message)
            raise _Refused(error.message) from error
        try:
            if place.identity in self._in_use:
                raise RequestRefused("another request for the same action's directory is being served")
            self._in_use[place.identity] = place
            try:
                await self._serve_at(place, rules, request, client)
            finally:
                self._give_back(place)
        finally:
            place.close()

    def _give_back(self, place: ActionPlace) -> None:
        """The action's directory is not ours any more: before the client is told, who may come again."""
        if self._in_use.get(place.identity) is place:
            del self._in_use[place.identity]

    async def _serve_at(
        self, place: ActionPlace, rules: Rules, request: ActionRequest, client: Client
    ) -> None:
        call = classify(request, rules.actions)
        if isinstance(call, OneShot):
            raise _Refused(call.reason)
        pool = rules.actions.pool_for(request.key)
        if pool is None:
            raise _Refused(f"no pool serves persistentWorkerKey {request.key!r}")
        if not is_warm(request, pool.warm_fraction):
            raise _Refused(f"pool {pool.name} serves {pool.warm_fraction:g} of its actions (warm_fraction)")
        key = _own_key(pool, place, rules) or _action_key(pool, place, request, call)
        await self._serve_with(pool, key, place, rules, request, call, client)

    async def _serve_with(
        self,
        pool: PoolConfig,
        key: WorkerKey,
        place: ActionPlace,
        rules: Rules,
        request: ActionRequest,
        call: WorkerCall,
        client: Client,
    ) -> None:
        """Try the protocols that the tool may speak; most often it is one, and known."""
        record = self.records.of(key)
        asked = pool.worker_protocol if pool.worker_command else call.protocol
        if pool.worker_command and not record.speaks:
            record.speaks = pool.worker_protocol  # the operator says so
        protocols = record.protocols(asked)
        if not record.breaker.allows(self._now()):
            raise _Refused(f"workers of {key.label} are not used for now: {record.breaker.reason}")
        attempt = _Attempt(self._pool, record, place, request, client, rules.actions.max_timeout_s)
        told = False
        try:
            try:
                texts = expand(call.arguments, place.fd, place.working_directory)
            except NotExpressible as error:
                raise _Refused(error.message) from error
            arguments = [os.fsencode(text) for text in texts]
            inputs = await self._inputs(call, record, place)
            for protocol in protocols:
                one = _with_protocol(key, protocol)
                if key.tool:
                    await self._pool.plant_seed(one, place.fd)
                work = WorkRequest.of(arguments=arguments, inputs=inputs)

                def answered(response: WorkResponse, protocol: str = protocol) -> None:
                    nonlocal told
                    told = True
                    record.answered(protocol)
                    self._give_back(place)
                    self._tell(client, record, call, inputs, response)

                outcome = await attempt.run(one, work, answered)
                if told:
                    return
                if isinstance(outcome, NotAWorker):
                    record.is_no_worker(protocol, self._now(), outcome.message, asked=asked)
                    continue
                self._settle(record, outcome)
                self._tell(client, record, call, inputs, outcome)
                return
        finally:
            record.breaker.says_nothing()
        raise _Refused(f"{key.label} is no persistent worker: {record.breaker.reason}")

    async def _inputs(
        self, call: WorkerCall, record: ToolRecord, place: ActionPlace
    ) -> list[tuple[bytes, bytes]]:
        if call.digests == "always" or (call.digests == "auto" and record.wants_digests):
            found = await asyncio.to_thread(self._digests.inputs_of, place.fd)
            return [(os.fsencode(path), digest) for path, digest in found]
        return []

    def _settle(self, record: ToolRecord, outcome: WorkResponse | WrapperError) -> None:
        """Remember what the outcome says of the tool."""
        if isinstance(outcome, WorkerLost | ActionTimedOut):
            record.breaker.failed(self._now(), outcome.message)

    def _tell(
        self,
        client: Client,
        record: ToolRecord,
        call: WorkerCall,
        inputs: list[tuple[bytes, bytes]],
        outcome: WorkResponse | WrapperError,
    ) -> None:
        if isinstance(outcome, WorkResponse):
            answer = outcome.pb
            if answer.exit_code and not inputs and call.digests == "auto" and _misses_digests(answer.output):
                record.wants_digests = True
                client.failed(
                    FailureKind.LOST,
                    "the tool misses the digests of its inputs, and gets them from now on; it said: "
                    + answer.output[-4096:].decode("utf-8", "replace"),
                )
                return
            client.ended(answer.exit_code, answer.output)
        elif isinstance(outcome, ActionTimedOut):
            client.failed(FailureKind.TIMEOUT, outcome.message)
        elif isinstance(outcome, RequestCancelled):
            client.failed(FailureKind.CANCELLED, outcome.message)
        elif isinstance(outcome, ActionLost | WorkerLost):
            client.failed(FailureKind.LOST, outcome.report())
        elif isinstance(outcome, WorkerStartFailed | RequestRefused):
            client.one_shot(outcome.report())  # what no worker can be given may run as it stands
        else:
            client.busy(outcome.report())


class _Attempt:
    """One action's runs: one, or one in each protocol that a tool on trial may speak."""

    def __init__(
        self,
        pool: WorkerPool,
        record: ToolRecord,
        place: ActionPlace,
        request: ActionRequest,
        client: Client,
        max_timeout_s: float | None,
    ) -> None:
        self._pool = pool
        self._record = record
        self._place = place
        timeouts = [one for one in (request.timeout_s, max_timeout_s) if one is not None]
        self._timeout_s = min(timeouts, default=None)
        self._client = client
        self._is_taken = False
        self._has_worker = False

    async def run(
        self, key: WorkerKey, work: WorkRequest, answered: Callable[[WorkResponse], None]
    ) -> WorkResponse | WrapperError:
        is_trial = self._record.speaks != key.protocol
        terms = Terms(taken=self._take, timeout_s=self._timeout_s, answered=answered, is_trial=is_trial)
        self._has_worker = False
        try:
            return await run_action(self._pool, key, work, directory_fd=self._place.fd, terms=terms)
        except (WorkerDied, WorkerProtocolError) as error:
            if self._has_worker:
                return WorkerLost(error.message, stderr_tail=error.stderr_tail)
            return NotAWorker(error.report()) if is_trial else error
        except WorkerStartFailed as error:
            return NotAWorker(error.report()) if is_trial else error
        except WrapperError as error:
            return error

    def _take(self) -> bool:
        self._has_worker = self._is_taken = self._is_taken or self._client.taken()
        return self._is_taken


def _own_key(pool: PoolConfig, place: ActionPlace, rules: Rules) -> WorkerKey | None:
    """The kind of worker that the pool's own command is; None: it has none."""
    domain, below = place.root.trust_domain, place.working_directory
    kind = (pool.name, domain, below)
    if kind not in rules.own_keys:
        if len(rules.own_keys) >= _MOST_KEYS:
            rules.own_keys.clear()
        rules.own_keys[kind] = own_worker_key(pool, "/", trust_domain=domain, working_directory=below)
    return rules.own_keys[kind]


def _action_key(pool: PoolConfig, place: ActionPlace, request: ActionRequest, call: WorkerCall) -> WorkerKey:
    """The kind of worker that the action's own tool is."""
    env = {**dict(_constant(request.env, place)), **pool.env}
    program = call.startup[0]
    if pool.runtime == "process" and "/" not in program:
        try:
            program = resolve_program(program, env, "/")
        except WorkerStartFailed as error:
            raise _Refused(error.message) from error
    argv = (program, *call.startup[1:], "--persistent_worker")
    return WorkerKey(
        pool=pool.name,
        argv=argv,
        cwd=pool.execroot.path,
        env=tuple(sorted(env.items())),
        trust_domain=place.root.trust_domain,
        persistent_worker_key=request.key,
        own_execroot=True,
        for_actions=True,
        working_directory=place.working_directory,
        tool=tool_identity(place.cwd_fd, argv),
    )


def _constant(env: Iterable[tuple[str, str]], place: ActionPlace) -> Iterable[tuple[str, str]]:
    """An action's environment without what is another one for every action: what names its directory."""
    return ((n, v) for n, v in env if n not in _OF_ONE_ACTION and place.directory not in v)


def _with_protocol(key: WorkerKey, protocol: str) -> WorkerKey:
    return key if key.protocol == protocol else replace(key, protocol=protocol)


def _misses_digests(output: bytes) -> bool:
    """Whether a tool's message says that it cannot work without the digests of its inputs."""
    text = output[-65536:].lower()
    return b"digest" in text and any(word in text for word in (b"missing", b"no ", b"without", b"require"))
