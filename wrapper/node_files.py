"""Writes the files of a NativeLink worker node. What is in them: `node_config.py`."""

from __future__ import annotations

import argparse
import io
import json
import os

from wrapper.config import load_config
from wrapper.errors import ConfigError
from wrapper.install_entrypoint import PROGRAM, install
from wrapper.node_config import keys_of, node_config


def write_node_files(given: argparse.Namespace) -> str:
    """Write NativeLink's configuration, the per-action client and its policy; the first one's path.

    Raises ConfigError, also if the pools do not serve this node's work directory.
    """
    work_root = os.path.join(os.path.abspath(given.data_dir), "work")
    config = load_config(given.pools)
    if work_root not in {root.path.rstrip("/") for root in config.actions.work_roots}:
        served = ", ".join(root.path for root in config.actions.work_roots) or "none"
        raise ConfigError(
            f"{given.pools}: actions.work_roots does not name {work_root}, where this node's actions run "
            f"(found {served})"
        )
    output_dir = os.path.abspath(given.output_dir)
    entrypoint = os.path.join(output_dir, PROGRAM)
    if os.path.exists(f"{entrypoint}.conf"):
        os.unlink(f"{entrypoint}.conf")  # of another start; what is generated here is nobody's to change
    install(output_dir, in_python=False, socket=given.socket, work_roots=[work_root], out=io.StringIO())
    document = node_config(
        given.template,
        scheduler=given.scheduler_endpoint,
        cas=given.cas_endpoint,
        data_dir=os.path.abspath(given.data_dir),
        name=given.name,
        entrypoint=entrypoint,
        keys=keys_of(given.pools) if given.advertise_keys else (),
    )
    path = os.path.join(output_dir, "nativelink.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    os.rename(f"{path}.new", path)
    return path
