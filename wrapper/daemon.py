"""`serve`: the pool daemon of a node. Composition root of action mode.

Owns the order of things: what is opened first, when it is ready, what a reload changes, and how it ends.
What happens to an action is `action_service.py`'s business.

Never started by the host of the actions: a process that inherits the streams of an action keeps that open
for ever, and the workers are to outlive it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from typing import Any

from wrapper import systemd
from wrapper.action_service import ActionService
from wrapper.admin.control import ControlServer, control_path
from wrapper.client_listener import ClientListener, bind_socket
from wrapper.config import load_config
from wrapper.errors import WrapperError
from wrapper.events import Event, EventBus, EventKind, log_events
from wrapper.pool.pool import WorkerPool
from wrapper.pool.worker_states import SERVING_STATES, WorkerState
from wrapper.runtime.base import Runtime
from wrapper.runtimes import runtimes_of
from wrapper.serving import check_mounts, serving_of

_READY = SERVING_STATES - {WorkerState.WARMING}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("nativelink_worker_wrapper")


async def serve(config_path: str, socket_path: str, *, log_dir: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code. Raises ConfigError and other WrapperErrors."""
    daemon = Daemon(config_path, socket_path, log_dir=log_dir)
    loop = asyncio.get_running_loop()
    for signum in _SIGNALS:
        loop.add_signal_handler(signum, daemon.stop, signal.Signals(signum).name)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload_soon)
    try:
        await daemon.run()
    finally:
        for signum in (*_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(signum)
    return 0


class Daemon:
    """One daemon. `run` is called once."""

    def __init__(self, config_path: str, socket_path: str, *, log_dir: str | None = None) -> None:
        self._config_path = os.path.abspath(config_path)
        self._socket_path = os.path.abspath(socket_path)
        self._log_dir = log_dir
        self._serving = serving_of(load_config(self._config_path))
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._reloading: asyncio.Task[dict[str, Any]] | None = None
        self.events = EventBus()
        self.events.subscribe(log_events)
        self._runtimes: dict[str, Runtime] = runtimes_of(
            self._serving.config, log_dir=log_dir, survives_kills=True
        )
        self._pool = WorkerPool(
            self._serving.settings,
            self._runtimes,
            total=self._serving.config.total_limits(),
            minimum_keys=self._serving.minimum_keys,
            events=self.events,
        )
        self._service = ActionService(self._pool, self._serving.rules)
        actions = self._serving.config.actions
        self._listener = ClientListener(
            self._socket_path,
            self._service.serve,
            group=actions.socket_group,
            max_per_peer=actions.max_connections,
        )
        self._switch(warm=actions.warm)

    async def run(self) -> None:
        """Serve until `stop`; when it returns, nothing is left of any worker. Raises ConfigError."""
        check_mounts(self._serving)
        self._listener.open()
        try:
            path = control_path(self._socket_path)
            control = ControlServer(bind_socket(path, 0o600, None), path, self._commands())
            await control.open()
            try:
                await self._run()
            finally:
                await control.close()
        finally:
            await self._listener.close()

    async def _run(self) -> None:
        self.events.subscribe(self._happened)
        try:
            self._pool.start()
            _log.info("serving %s with %s", self._socket_path, self._config_path)
            self._look_whether_ready()
            await self._stopping.wait()
            systemd.notify("STOPPING=1")
            await self._drain()
        finally:
            await self._listener.close()
            await self._pool.close(0.0)

    async def _drain(self) -> None:
        """New actions are turned away, those that are running go on, for a time."""
        timeout_s = self._serving.config.drain_timeout_s
        _log.info("draining: %d actions, at most %g s", self._listener.in_flight, timeout_s)
        self._listener.refuse_new("the pool daemon is stopping")
        quiet = asyncio.create_task(self._listener.wait_until_quiet())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((quiet, hurry), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (quiet, hurry):
            task.cancel()

    def stop(self, why: str) -> None:
        """Drain and end. A second call ends at once."""
        if self._stopping.is_set():
            self._hurry.set()
            return
        _log.info("%s: stopping", why)
        self._stopping.set()

    # ---- ready -----------------------------------------------------------------------------------------

    def _happened(self, event: Event) -> None:
        if event.kind in (EventKind.WORKER_READY, EventKind.WORKER_START_FAILED):
            self._loop.call_soon(self._look_whether_ready)  # when the core's books are in order

    def _missing(self) -> dict[str, int]:
        """How many workers each pool lacks of its minimum."""
        states = self._pool.pool_states()
        missing = {}
        for name in self._serving.minimum_keys:
            ready = sum(states[name].states[one] for one in _READY)
            lacking = states[name].limits.min_warm_workers - ready
            if lacking > 0:
                missing[name] = lacking
        return missing

    def _look_whether_ready(self) -> None:
        missing = self._missing()
        status = "ready"
        if missing:
            status = "waiting for " + ", ".join(f"{count} of pool {name}" for name, count in missing.items())
        if not missing and not self._ready.is_set():
            self._ready.set()
            _log.info("ready: every pool has its minimum of warm workers")
            systemd.notify("READY=1", f"STATUS={status}")
        elif not self._ready.is_set():
            systemd.notify(f"STATUS={status}")

    # ---- another configuration -------------------------------------------------------------------------

    def reload_soon(self) -> None:
        """On SIGHUP. What is wrong with the new configuration is logged, and the old one stays."""
        task = self._loop.create_task(self._reload({}), name="reload")
        task.add_done_callback(_log_problem)

    async def _reload(self, _asked: Mapping[str, Any]) -> dict[str, Any]:
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={int(self._loop.time() * 1e6)}")
        try:
            new = serving_of(load_config(self._config_path))
            changed = new.changed_since(self._serving)
            runtimes = runtimes_of(new.config, log_dir=self._log_dir, survives_kills=True)
            before = {pool.name: pool for pool in self._serving.config.pools}
            for pool in new.config.pools:
                # The runtime of a pool that did not change has its workers; plain processes have one for all.
                old = before.get(pool.name)
                if old is not None and pool.name not in changed:
                    runtimes[pool.name] = self._runtimes[pool.name]
                elif pool.runtime == "process":
                    runtimes[pool.name] = self._processes() or runtimes[pool.name]
            self._pool.reconfigure(
                new.settings,
                runtimes,
                total=new.config.total_limits(),
                minimum_keys=new.minimum_keys,
                changed=changed,
            )
            self._serving, self._runtimes = new, runtimes
            self._service.rules = new.rules
            self._listener.max_per_peer = new.config.actions.max_connections
            self._switch(warm=new.config.actions.warm)
            _log.info(
                "configuration read again; pools that changed: %s", ", ".join(sorted(changed)) or "none"
            )
            return {"changed": sorted(changed)}
        finally:
            systemd.notify("READY=1")

    def _processes(self) -> Runtime | None:
        for pool in self._serving.config.pools:
            if pool.runtime == "process":
                return self._runtimes[pool.name]
        return None

    # ---- what an operator asks -------------------------------------------------------------------------

    def _commands(self) -> dict[str, Any]:
        return {
            "status": self._status,
            "wait-ready": self._wait_ready,
            "off": self._off,
            "on": self._on,
            "reload": self._reload,
        }

    async def _status(self, _asked: Mapping[str, Any]) -> dict[str, Any]:
        states = self._pool.pool_states()
        return {
            "ready": self._ready.is_set(),
            "missing": self._missing(),
            "off": self._service.is_off,
            "in_flight": self._listener.in_flight,
            "pools": {
                name: {state.value: count for state, count in pool.states.items() if count}
                for name, pool in states.items()
            },
        }

    async def _wait_ready(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        timeout_s = float(asked.get("for_s", 0.0))
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            pass
        return await self._status(asked)

    async def _off(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self._service.is_off = str(asked.get("reason") or "workers are switched off")
        _log.warning("off: actions run without workers from now on (%s)", self._service.is_off)
        return await self._status(asked)

    async def _on(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self._service.is_off = ""
        _log.warning("on: actions run with workers from now on")
        return await self._status(asked)

    def _switch(self, *, warm: bool) -> None:
        if not warm:
            self._service.is_off = "workers are switched off in the configuration (actions.warm)"
        elif self._service.is_off.endswith("(actions.warm)"):
            self._service.is_off = ""


def _log_problem(task: asyncio.Task[dict[str, Any]]) -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, WrapperError):
        _log.error("the configuration stays as it is: %s", error.report())
    elif error is not None:
        _log.error("the configuration could not be read again", exc_info=error)
