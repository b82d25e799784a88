"""Workers in containers of a CRI engine, CRI-O or containerd: the runtime `cri`.

Owns the start of a worker: its folder, pod, container, and the proof that it is isolated as asked. Each
worker has a pod of its own, since what is in one pod shares the loopback network. Everything it makes carries
labels (owner, generation, pool, worker), so that a later process knows what this one has left.

Knows nothing of the worker protocol or of pools.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from dataclasses import dataclass
from typing import Any

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed, WrapperError
from wrapper.generation import Generation
from wrapper.runtime import cri_runtime_pb2 as cri
from wrapper.runtime import linux, process_tree
from wrapper.runtime.base import Mount, WorkerSpec
from wrapper.runtime.bounded_tmp import mount_bounded
from wrapper.runtime.cgroups import ContainerGroup
from wrapper.runtime.cri_belongings import (
    GENERATION_LABEL,
    KEY_LABEL,
    LABEL,
    OWNER_LABEL,
    POOL_LABEL,
    WORKER_LABEL,
    Belongings,
    Removal,
)
from wrapper.runtime.cri_engine import ContainerState, CriEngine, Deadlines
from wrapper.runtime.cri_owned import Owned
from wrapper.runtime.cri_stdio import SOCKET_NAME, ShimLink, StartedPids
from wrapper.runtime.cri_worker import ContainerWorker, pid_inside
from wrapper.runtime.isolation import OWN_PROCESSES, Isolation, what_was_ignored
from wrapper.runtime.native import shim_path
from wrapper.runtime.node_gc import AGENT
from wrapper.runtime.stderr_log import StderrForward, StderrLogs
from wrapper.runtime.stderr_reader import StderrReader
from wrapper.runtime.worker_gc import SeenInside, WorkerGc

SHIM = "/nlww/shim"
RUN_FOLDER = "/nlww/run"
NODE_AGENT = "/nlww/node_gc_agent.js"
TMP = "/tmp"  # noqa: S108 - the container's own
NAMESPACE = "nativelink-worker-wrapper"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CriSettings:
    """What the configuration says of a pool's containers."""

    pool: str
    socket: str
    image: str
    isolation: Isolation = Isolation()  # noqa: RUF009 - frozen
    mounts: tuple[Mount, ...] = ()
    """Paths of the node that every worker of the pool may read."""
    state_dir: str = "/run/nativelink_worker_wrapper"
    """Where the workers' sockets and temporary folders are; below it, one folder for each process of ours."""
    deadlines: Deadlines = Deadlines()  # noqa: RUF009 - frozen


class CriRuntime:
    """Starts workers in containers. `log_dir` and `forward_stderr_to`: as LocalProcessRuntime."""

    def __init__(
        self, settings: CriSettings, *, log_dir: str | None = None, forward_stderr_to: int | None = None
    ) -> None:
        self.settings = settings
        self.engine = CriEngine(settings.socket, settings.deadlines)
        self.removal = Removal(self.engine)
        self.cursor = linux.PidCursor()
        self.logs = StderrLogs(log_dir) if log_dir is not None else None
        self.forward = StderrForward(forward_stderr_to) if forward_stderr_to is not None else None
        self.owned = Owned(self.engine, settings.state_dir)
        self._generation: Generation | None = None
        self._systemd = False
        self._preparing: asyncio.Task[Generation] | None = None
        self._serials = itertools.count(1)
        self._unwanted: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<CriRuntime {self.settings.pool} on {self.settings.socket}>"

    async def prepare(self) -> None:
        """See Runtime."""
        await self._prepared()

    async def start(self, spec: WorkerSpec) -> ContainerWorker:
        """See Runtime."""
        generation = await self._prepared()
        birth = asyncio.create_task(
            _Birth(self, spec, generation, next(self._serials), systemd=self._systemd).run(),
            name=f"start a container of {self.settings.pool}",
        )
        try:
            return await asyncio.shield(birth)
        except asyncio.CancelledError:
            # Not in the middle of a call: nobody would know what the engine makes of it.
            ending = asyncio.create_task(_end_unwanted(birth), name="end an unwanted container")
            self._unwanted.add(ending)
            ending.add_done_callback(self._unwanted.discard)
            await asyncio.wait([ending], timeout=self.settings.deadlines.abandon_s)
            raise

    async def _prepared(self) -> Generation:
        """The folder of this process; its dead predecessors' are removed first. Tried again if it failed."""
        if self._closed:
            raise RuntimeUnavailable(f"{self!r} is closed")
        if self._generation is not None:
            return self._generation
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._prepare(), name="prepare the container runtime")
            self._preparing.add_done_callback(_retrieved)
        return await asyncio.shield(self._preparing)

    async def _prepare(self) -> Generation:
        shim_path()
        uid = self.settings.isolation.run_as_user
        if uid == 0:
            raise RuntimeUnavailable(
                "a worker must not run as root (isolation.run_as_user): it could overwrite inputs"
            )
        version = await self.engine.version()
        base = self.settings.state_dir
        removed = await self.owned.remove_of_dead()
        if removed:
            _log.warning("removed what %d processes before this one had left in %s", removed, base)
        self._systemd = await self.engine.puts_groups_under_systemd()
        self._generation = Generation.begin(base)
        _log.info("workers of pool %s run in containers of %s", self.settings.pool, version)
        return self._generation

    async def close(self) -> None:
        """See Runtime. Idempotent. What the engine does not remove in time, the next start does."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._preparing is not None:
                _, late = await asyncio.wait([self._preparing], timeout=self.settings.deadlines.removal_s)
                for task in late:
                    task.cancel()
                    await asyncio.wait([task])
            if self._unwanted:
                await asyncio.wait(self._unwanted, timeout=self.settings.deadlines.removal_s)
            all_removed = await self.removal.finish()
            if self._generation is not None and all_removed:
                await self._last_look(self._generation)
        finally:
            self.cursor.close()
            generation, self._generation = self._generation, None
            await self.engine.close()
            if generation is not None:
                generation.leave()

    async def _last_look(self, generation: Generation) -> None:
        """For what the engine has made of a call that we gave up; and the predecessors' likewise."""
        try:
            async with asyncio.timeout(self.settings.deadlines.removal_s):
                await self.owned.remove_of(generation.name)
                await self.owned.remove_of_dead()
        except (RuntimeUnavailable, TimeoutError) as error:
            _log.error("%s: %s; the next start looks again", self.engine.name, error)
        else:
            generation.wipe()


def _retrieved(task: asyncio.Task[Generation]) -> None:
    """Whoever waited for it may have been cancelled: then it may fail in silence."""
    if not task.cancelled():
        task.exception()


async def _end_unwanted(birth: asyncio.Task[ContainerWorker]) -> None:
    """The start was cancelled while it was under way, and may succeed all the same."""
    try:
        worker = await birth
    except WrapperError:
        return  # it has undone itself
    await worker.stop(0)


class _Birth:
    """The start of one worker, never cancelled in the middle: every step's outcome is known or looked up."""

    def __init__(
        self, runtime: CriRuntime, spec: WorkerSpec, generation: Generation, serial: int, *, systemd: bool
    ) -> None:
        self._runtime = runtime
        self._spec = spec
        self._settings = runtime.settings
        self._generation = generation
        self._serial = serial
        self._systemd = systemd
        self._link: ShimLink | None = None
        self._stderr: StderrReader | None = None
        self._gc: WorkerGc | None = None
        self._own = Belongings(
            {
                OWNER_LABEL: runtime.owned.owner,
                GENERATION_LABEL: generation.name,
                WORKER_LABEL: str(serial),
            }
        )

    async def run(self) -> ContainerWorker:
        try:
            self._furnish()
            pod, pids = await self._run_container()
            group = ContainerGroup(pids.worker)
            if self._systemd and self._settings.isolation.pids_limit is not None:
                group.limit_parent(self._settings.isolation.pids_limit + OWN_PROCESSES)
            self._prove_isolation(pids, group)
            assert self._link is not None  # noqa: S101 - furnished, as the next two
            assert self._stderr is not None  # noqa: S101
            assert self._gc is not None  # noqa: S101
            self._stderr.begin(f"=== worker {pids.worker}, pod {pod}: {self._spec.argv!r} ===\n")
            return ContainerWorker(
                self._spec, self._runtime, self._own, self._link, pids, group, self._gc, self._stderr
            )
        except BaseException as error:
            told = await self._failed(error)
            if told is error:
                raise
            raise told from error

    async def _failed(self, error: BaseException) -> BaseException:
        """Undo all; returns what to tell."""
        ended_at_once = isinstance(error, Exception) and self._worker_is_dead()
        if self._link is not None:
            self._link.close_stdin()
        removal = self._runtime.removal.begin(self._own)
        await asyncio.wait([removal], timeout=self._settings.deadlines.removal_s)
        tail = b""
        if self._stderr is not None:
            tail = self._stderr.tail()
            self._stderr.close()
        if self._link is not None:
            self._link.close()
        if self._gc is not None:
            self._gc.close()
        if ended_at_once and self._link is not None and self._link.exited.done():
            error = WorkerStartFailed(f"it ended at once ({self._link.exited.result()})")
        if isinstance(error, WorkerStartFailed):
            return WorkerStartFailed(
                f"cannot start {self._spec.argv[0]!r} in a container of image "
                f"{self._settings.image}: {error.message}",
                stderr_tail=tail,
            )
        if isinstance(error, WrapperError) or not isinstance(error, Exception):
            return error
        return RuntimeUnavailable(f"cannot start a container for pool {self._settings.pool}: {error!r}")

    def _worker_is_dead(self) -> bool:
        """Whether it was started, and has ended by itself."""
        started = None if self._link is None else self._link.started
        if started is None or not started.done() or started.exception() is not None:
            return False
        return process_tree.is_dead(started.result().worker)

    # ---- on the node -------------------------------------------------------------------------------

    def _furnish(self) -> None:
        """The worker's folder, its /tmp, its group, and the socket that its shim will connect to."""
        if not self._spec.argv:
            raise WorkerStartFailed("the worker's command is empty")
        isolation = self._settings.isolation
        uid, gid = isolation.run_as_user, isolation.run_as_group
        folder = os.path.join(self._generation.path, str(self._serial))
        try:
            os.mkdir(folder, 0o700)
            self._own.folder = folder
            run, tmp = os.path.join(folder, "run"), os.path.join(folder, "tmp")
            os.mkdir(run, 0o755)
            os.mkdir(tmp, 0o700)
            if isolation.tmp_limit_bytes is not None:
                mount_bounded(tmp, isolation.tmp_limit_bytes, uid, gid)
                self._own.tmp = tmp
            elif os.geteuid() != uid:
                os.chown(tmp, uid, gid)
        except OSError as error:
            raise RuntimeUnavailable(f"cannot make the folder of a worker: {error}") from error
        if not self._systemd:
            group = self._runtime.owned.group(self._generation.name, self._serial)
            self._own.group = group
            group.make(None if isolation.pids_limit is None else isolation.pids_limit + OWN_PROCESSES)
        loop = asyncio.get_running_loop()
        self._link = ShimLink(run, uid, gid)
        runtime = self._runtime
        self._stderr = StderrReader(
            self._link.take_stderr(), loop, self._spec.name, runtime.logs, runtime.forward
        )
        inside = SeenInside(RUN_FOLDER, NODE_AGENT, uid, gid, pid_inside(self._link))
        self._gc = WorkerGc(self._spec, run, loop, inside)

    def _mounts(self) -> list[Mount]:
        run, tmp = os.path.join(self._own.folder, "run"), os.path.join(self._own.folder, "tmp")
        own = [Mount(shim_path(), SHIM), Mount(run, RUN_FOLDER), Mount(tmp, TMP, read_only=False)]
        if self._gc is not None and self._gc.environment:
            own.append(Mount(AGENT, NODE_AGENT))
        return [*own, *self._settings.mounts, *self._spec.mounts]

    # ---- in the engine -----------------------------------------------------------------------------

    async def _run_container(self) -> tuple[str, StartedPids]:
        engine, own, link = self._runtime.engine, self._own, self._link
        assert link is not None  # noqa: S101 - furnished
        image_id = await engine.ensure_image(self._settings.image)
        pod = self._pod_config()
        own.pod_was_asked_for = True
        pod_id = await engine.run_pod(pod)
        if pod_id not in await engine.pods(own.labels):
            raise RuntimeUnavailable(
                f"{engine.name}: RunPodSandbox ({pod.metadata.name}): answered with pod {pod_id}, which "
                "somebody else has made; it is left alone"
            )
        container = self._container_config(image_id)
        own.container_id = await engine.create_container(pod_id, container, pod)
        await engine.start_container(own.container_id)
        state = await engine.container(own.container_id)
        if any(state.labels.get(name) != value for name, value in own.labels.items()):
            raise RuntimeUnavailable(
                f"{engine.name}: CreateContainer ({pod.metadata.name}): answered with container "
                f"{own.container_id}, which somebody else has made; it is left alone"
            )
        await self._shim_has_reported(link, state)
        pids = link.started.result()
        if state.pid is not None and state.pid != pids.shim:
            raise RuntimeUnavailable(
                f"{engine.name}: container {own.container_id} runs process {state.pid}, but process "
                f"{pids.shim} answers for it: the engine lives in another pid namespace"
            )
        return pod_id, pids

    async def _shim_has_reported(self, link: ShimLink, state: ContainerState) -> None:
        """Return when it has, or never will: then `link.started` says why."""
        limit_s = self._settings.deadlines.shim_s
        if state.ended is not None:
            link.give_up_waiting(f"its first process ended before it reported: {state.ended}")
            return
        alive = asyncio.ensure_future(
            asyncio.sleep(limit_s) if state.pid is None else linux.wait_until_dead([state.pid], limit_s)
        )
        either: set[asyncio.Future[Any]] = {link.started, alive}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            alive.cancel()
        if not link.started.done():
            await asyncio.sleep(0)  # what it told last is read before its end is
            died = state.pid is not None and process_tree.is_dead(state.pid)
            told = "ended before it reported" if died else f"did not report within {limit_s:g} s"
            link.give_up_waiting(f"its first process {told}")

    def _pod_config(self) -> cri.PodSandboxConfig:
        settings = self._settings
        group = "" if self._own.group is None else self._own.group.name
        if self._systemd:
            group = self._runtime.owned.slice(self._generation.name, self._serial)
        # Never the same name twice: for one that it knows CRI-O answers with the old container.
        name = f"nlww-{settings.pool}-{self._generation.name}-{self._serial}"
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, uid=name, namespace=NAMESPACE),
            hostname="worker",
            dns_config=cri.DNSConfig(servers=["127.0.0.1"]),  # not the node's: nothing is to be reached
            labels=self._labels(),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=group, security_context=settings.isolation.of_pod()
            ),
        )

    def _container_config(self, image_id: str) -> cri.ContainerConfig:
        assert self._gc is not None  # noqa: S101 - furnished
        env = {**self._spec.env, "TMPDIR": TMP, **self._gc.environment}
        # As the image's own variables would reach a plain process; what the engine adds, it adds.
        return cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="worker"),
            image=cri.ImageSpec(image=image_id, user_specified_image=self._settings.image),
            command=[SHIM, f"{RUN_FOLDER}/{SOCKET_NAME}", *self._spec.argv],
            working_dir=self._spec.cwd,
            envs=[cri.KeyValue(key=name, value=value) for name, value in env.items()],
            mounts=[
                cri.Mount(container_path=one.path, host_path=one.host_path, readonly=one.read_only)
                for one in self._mounts()
            ],
            labels=self._labels(),
            linux=self._settings.isolation.of_container(),
        )

    def _labels(self) -> dict[str, str]:
        return {
            **self._own.labels,
            LABEL: "worker",
            POOL_LABEL: self._settings.pool,
            KEY_LABEL: self._spec.name[:63],
        }

    def _prove_isolation(self, pids: StartedPids, group: ContainerGroup) -> None:
        ignored = what_was_ignored(self._settings.isolation, pids.worker, group, self._mounts())
        if ignored:
            raise RuntimeUnavailable(
                f"{self._runtime.engine.name} did not isolate a worker of pool {self._settings.pool} as "
                f"asked: {'; '.join(ignored)}. Mend the engine, or switch that off by its name, knowing what "
                "it means"
            )
