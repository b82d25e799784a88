"""The command lines of the pool daemon: `serve`, and those that speak to a daemon that runs."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence

from wrapper.errors import RuntimeUnavailable

DEFAULT_SOCKET = "/run/nativelink_worker_wrapper/pool.sock"
PROGRAM = "nativelink_worker_wrapper"

_SERVE = """\
Keeps the pools of a configuration and serves the actions of a NativeLink node with them: each action's
nativelink_worker_entrypoint connects to the socket. Started outside NativeLink, and before it.

SIGHUP reads the configuration again: pools that did not change keep their warm workers. SIGTERM takes no new
actions, lets those that are running end (drain_timeout_s), and stops every worker; a second one ends at once.
"""


def serve(args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    parser = parser_class(
        prog=f"{PROGRAM} serve", description=_SERVE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the pools (check-config explains it)"
    )
    parser.add_argument(
        "--socket", default=DEFAULT_SOCKET, metavar="PATH", help=f"for the clients (default {DEFAULT_SOCKET})"
    )
    parser.add_argument("--log-dir", metavar="DIR", help="keep the workers' stderr there, in rotating files")
    parser.add_argument("--verbose", action="store_true", help="log every worker's start and end")
    given = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    if given.verbose:
        logging.getLogger(PROGRAM).setLevel(logging.DEBUG)
    from wrapper.daemon import serve as run_daemon
    from wrapper.event_loop import run

    # What is loaded now stays; what an action leaves behind has no cycles, and is looked at seldom.
    gc.enable()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    return run(run_daemon(given.config, given.socket, log_dir=given.log_dir))


def wait_ready(args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    parser = _parser(
        parser_class,
        "wait-ready",
        "Wait until every pool has its minimum of warm workers; say what is missing.",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="then give up, exit code 75 (default 300)",
    )
    given = parser.parse_args(args)
    from wrapper.admin.control import ask

    deadline = time.monotonic() + given.timeout
    shown = ""
    while True:
        left = deadline - time.monotonic()
        try:
            answer = ask(given.socket, "wait-ready", timeout_s=10.0, for_s=max(0.0, min(1.0, left)))
        except RuntimeUnavailable as error:  # it may be about to start
            if left <= 0:
                raise
            text = error.message
            time.sleep(min(0.1, max(0.0, left)))
        else:
            if answer["ready"]:
                print("ready")
                return 0
            text = "waiting for " + ", ".join(
                f"{count} of pool {name}" for name, count in answer["missing"].items()
            )
            if left <= 0:
                print(f"{PROGRAM}: not ready after {given.timeout:g} s: {text}", file=sys.stderr)
                return 75
        if text != shown:
            print(text, file=sys.stderr, flush=True)
            shown = text


def switch(command: str, args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    """`off` and `on`."""
    about = {
        "off": "Run every action without workers from now on, at once, until `on`. Running ones go on.",
        "on": "Use workers again, after `off`.",
    }
    parser = _parser(parser_class, command, about[command])
    if command == "off":
        parser.add_argument("--reason", default="", help="told to every action's log")
    given = parser.parse_args(args)
    from wrapper.admin.control import ask

    values = {"reason": given.reason} if command == "off" else {}
    answer = ask(given.socket, command, **values)
    print(f"workers are off: {answer['off']}" if answer["off"] else "workers are on")
    return 0


def reload(args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    parser = _parser(
        parser_class, "reload", "Make the daemon read its configuration again; says which pools have changed."
    )
    given = parser.parse_args(args)
    from wrapper.admin.control import ask

    changed = ask(given.socket, "reload")["changed"]
    print(f"pools that changed: {', '.join(changed) or 'none'}")
    return 0


def node_config(args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    parser = parser_class(
        prog=f"{PROGRAM} node-config",
        description="Write what a NativeLink worker node needs: nativelink.json, and the policy file of the "
        "per-action client. nativelink_worker_wrapper.sh does this before it starts NativeLink.",
    )
    parser.add_argument("--template", required=True, metavar="FILE", help="nativelink-config.json")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the two files are written")
    parser.add_argument(
        "--pools", required=True, metavar="FILE", help="the pools; checked, and read for keys"
    )
    parser.add_argument("--scheduler-endpoint", required=True, metavar="URL", help="of the worker API")
    parser.add_argument("--cas-endpoint", metavar="URL", help="default: port 50051 of the scheduler's host")
    parser.add_argument("--data-dir", default="/var/lib/nativelink", metavar="DIR")
    parser.add_argument("--name", default="warm-", help="of the worker, to the scheduler")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help="of the pool daemon")
    parser.add_argument(
        "--advertise-keys",
        action="store_true",
        help="tell the scheduler which persistentWorkerKeys are served",
    )
    given = parser.parse_args(args)
    from wrapper.node_files import write_node_files

    path = write_node_files(given)
    print(path)
    return 0


def install(args: Sequence[str], parser_class: Callable[..., argparse.ArgumentParser]) -> int:
    parser = parser_class(
        prog=f"{PROGRAM} install-entrypoint",
        description="Put nativelink_worker_entrypoint, the program that NativeLink's `entrypoint` names, "
        "into a directory, and beside it the file that says what it does, nativelink_worker_entrypoint.conf, "
        "unless there is one.",
    )
    parser.add_argument("directory", metavar="DIR", help="made if it is not there")
    parser.add_argument("--python", action="store_true", help="the program in Python, not the one in C")
    parser.add_argument("--socket", metavar="PATH", help="for a new file: the pool daemon's socket")
    parser.add_argument(
        "--work-root",
        metavar="DIR",
        action="append",
        default=[],
        help="for a new file: NativeLink's work directory; may be repeated",
    )
    given = parser.parse_args(args)
    from wrapper.install_entrypoint import install as put

    return put(
        given.directory,
        in_python=given.python,
        socket=given.socket,
        work_roots=given.work_root,
        out=sys.stdout,
    )


def _parser(
    parser_class: Callable[..., argparse.ArgumentParser], name: str, about: str
) -> argparse.ArgumentParser:
    parser = parser_class(prog=f"{PROGRAM} {name}", description=about)
    parser.add_argument(
        "--socket",
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help=f"the daemon's, as given to serve (default {DEFAULT_SOCKET})",
    )
    return parser
