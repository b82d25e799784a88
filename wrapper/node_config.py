"""The configuration of a NativeLink worker node: `nativelink-config.json` with a node's own values.

Owns what of the template is a node's own. What the fields mean is in `docs/nativelink.md`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import json5

from wrapper.errors import ConfigError

CAS_PORT = 50051
_SCHEMES = {"http": "grpc", "https": "grpcs", "grpc": "grpc", "grpcs": "grpcs"}


def endpoint(url: str, default_port: int | None = None) -> str:
    """An endpoint as NativeLink wants it, `grpc://HOST:PORT`, of that or of `http://HOST:PORT`.

    Raises ConfigError for anything else.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or default_port
    except ValueError:
        port = None
    if parts.scheme not in _SCHEMES or not parts.hostname or port is None or parts.path.strip("/"):
        raise ConfigError(
            f"{url!r} is no endpoint: say http://HOST:PORT or grpc://HOST:PORT (with TLS https or grpcs)"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{_SCHEMES[parts.scheme]}://{host}:{port}"


def node_config(
    template: str | os.PathLike[str],
    *,
    scheduler: str,
    cas: str | None = None,
    data_dir: str = "/var/lib/nativelink",
    name: str = "warm-",
    entrypoint: str = "/usr/local/bin/nativelink_worker_entrypoint",
    cpus: int | None = None,
    keys: Sequence[str] = (),
) -> dict[str, Any]:
    """A worker node's configuration: one worker, and a cache of the CAS at `cas`.

    `scheduler`: the endpoint of its worker API. `cas`: of CAS and AC; None: port 50051 of the same host.
    `keys`: the persistentWorkerKeys to be told to the scheduler as the worker's property, for one that
    matches them. `cpus`: None for `nproc`, asked by NativeLink. Raises ConfigError.
    """
    document = _load(template)
    worker = dict(document["workers"][0]["local"])
    scheduler = endpoint(scheduler)
    if cas is None:
        parts = urlsplit(scheduler)
        cas = f"{parts.scheme}://{parts.netloc.rsplit(':', 1)[0]}:{CAS_PORT}"
    cas = endpoint(cas, CAS_PORT)
    properties = dict(worker["platform_properties"])
    if cpus is not None:
        properties["cpu_count"] = {"values": [str(cpus)]}
    if keys:
        properties["persistentWorkerKey"] = {"values": list(keys)}
    worker.update(
        name=name,
        worker_api_endpoint={"uri": scheduler},
        work_directory=os.path.join(data_dir, "work"),
        entrypoint=entrypoint,
        platform_properties=properties,
        upload_action_result={"ac_store": "AC"},
        cas_fast_slow_store="CAS",
    )
    max_bytes = document["stores"][1]["fast_slow"]["fast"]["filesystem"]["eviction_policy"]["max_bytes"]
    fast = {
        "content_path": os.path.join(data_dir, "cas"),
        "temp_path": os.path.join(data_dir, "cas-tmp"),
        "eviction_policy": {"max_bytes": max_bytes},
    }
    remote = {"instance_name": "", "endpoints": [{"address": cas}]}
    return {
        "stores": [
            {"name": "AC", "grpc": {**remote, "store_type": "ac"}},
            {
                "name": "CAS",
                "fast_slow": {
                    "fast": {"filesystem": fast},
                    "slow": {"grpc": {**remote, "store_type": "cas"}},
                },
            },
        ],
        "workers": [{"local": worker}],
        "servers": [],
        "global": document.get("global", {}),
    }


def keys_of(config_path: str) -> list[str]:
    """The persistentWorkerKeys that a pools document names in full: no scheduler matches patterns."""
    from wrapper.config import load_config

    keys = [key for pool in load_config(config_path).pools for key in pool.keys]
    return [key for key in keys if not re.search(r"[*?\[]", key)]


def _load(template: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(template, encoding="utf-8") as file:
            document = json5.load(file)
        document["workers"][0]["local"]["platform_properties"]
        document["stores"][1]["fast_slow"]["fast"]["filesystem"]["eviction_policy"]["max_bytes"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{template}: cannot be read: {error}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{template}: is not like nativelink-config.json: {error!r} is missing") from error
    assert isinstance(document, dict)  # noqa: S101 - it has keys
    return document
