"""The command line of `nativelink_worker_wrapper`.

Owns the options, their help and the exit codes; what they start is imported when it is known, since a
worker host waits for the first answer.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wrapper.errors import ConfigError, WrapperError

if TYPE_CHECKING:
    from wrapper.config import PoolConfig
    from wrapper.pool.limits import TotalLimits
    from wrapper.worker_mode import WorkerModeOptions

VERSION = "0.1.0"
PERSISTENT_WORKER = "--persistent_worker"
USAGE_EXIT_CODE = 64
_DAEMON_COMMANDS = ("serve", "wait-ready", "off", "on", "reload", "node-config", "install-entrypoint")

_DESCRIPTION = """\
Keeps compilers warm: a persistent worker to Bazel (or any worker host), a pool of warm workers behind it.

Put it in front of a tool that is a persistent worker. It starts the tool with --persistent_worker, sends
each WorkRequest to a warm instance that is free, and cleans up, collects garbage and recycles in between.
One multiplex wrapper drives several singleplex tools: it gives them parallelism.
"""

_EPILOG = """\
examples:
  nativelink_worker_wrapper -- java -jar compiler.jar --persistent_worker
      serve WorkRequests from stdin with up to 10 warm instances of compiler.jar

  nativelink_worker_wrapper --max-instances 2 --idle-timeout 60 -- ./tool --persistent_worker
      at most two instances, each stopped after a minute without work

  nativelink_worker_wrapper -- java -jar compiler.jar @args.txt
      no --persistent_worker: becomes the tool, once

  nativelink_worker_wrapper --config pools.json5 --persistent-worker-key java-17 -- tool --persistent_worker
      limits, warm-up and cleaning of the pool that serves the key java-17

  nativelink_worker_wrapper check-config pools.json5
      say what a configuration means, or what is wrong with it

  nativelink_worker_wrapper check-runtime pools.json5
      say whether the container engine can do what the configuration asks of it

  nativelink_worker_wrapper record --output javac.rec -- tool --persistent_worker
      serve as usual, and keep the requests with their inputs to prime new workers with

  nativelink_worker_wrapper probe -- tool --option @flags
      test whether a tool is a good persistent worker, in eleven checks

  nativelink_worker_wrapper explain-key exec.json //a:lib //b:lib
      say why two actions of a Bazel build have different persistentWorkerKeys of Bazel's own

  nativelink_worker_wrapper install-entrypoint --work-root /var/lib/nativelink/work /usr/local/bin
      put the program that NativeLink starts for each action, and its policy file, into /usr/local/bin

  nativelink_worker_wrapper serve --config pools.json5 --socket /run/nativelink_worker_wrapper/pool.sock
      the pool daemon of a NativeLink node; wait-ready, off, on and reload speak to it (--help explains each)

exit codes: 0 the host closed stdin or sent SIGTERM and all requests were answered; 64 wrong usage;
65 the host's requests cannot be understood; 69 the tool cannot be started; 78 wrong configuration.
"""

_RECORD_DESCRIPTION = """\
Runs as a persistent worker in front of the tool, as without "record", and writes the requests that come by,
with the input files that they name, to a file. New workers of a pool whose warmup.requests names that file
run them before they are ready, so that their first real request finds compiled code.

All options of worker mode are taken too. The file holds whatever the requests have read: keep it as safe.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    gc.disable()  # until everything is imported: a tenth of that time, and there is no garbage yet
    try:
        if args[:1] == ["check-config"]:
            return _check_config(args[1:])
        if args[:1] == ["check-runtime"]:
            return _check_runtime(args[1:])
        if args[:1] == ["explain-key"]:
            return _explain_key(args[1:])
        if args[:1] == ["probe"]:
            return _probe(args[1:])
        if args[:1] and args[0] in _DAEMON_COMMANDS:
            return _daemon_command(args[0], args[1:])
        if args[:1] == ["record"]:
            return _worker_mode(args[1:], recording=True)
        return _worker_mode(args)
    except WrapperError as error:
        print(f"nativelink_worker_wrapper: {error.report()}", file=sys.stderr)
        return error.exit_code
    finally:
        gc.enable()


def _explain_key(args: Sequence[str]) -> int:
    parser = _Parser(
        prog="nativelink_worker_wrapper explain-key",
        description="Say what Bazel's own persistentWorkerKey (--experimental_remote_mark_tool_inputs) is "
        "made of for the actions of an execution log, or why two of them have different ones.",
    )
    parser.add_argument("log", metavar="LOG", help="written by bazel build --execution_log_json_file=LOG")
    parser.add_argument(
        "label", nargs="?", metavar="LABEL", help="show what the key of this target is made of"
    )
    parser.add_argument(
        "other", nargs="?", metavar="LABEL", help="compare it with this one's; 1: they differ"
    )
    parser.add_argument(
        "--key", metavar="HEX", help="say whether this is the key, and in which order it is made"
    )
    given = parser.parse_args(args)
    from wrapper.explain_key import explain_key

    labels = [label for label in (given.label, given.other) if label is not None]
    return explain_key(given.log, labels, given.key, sys.stdout)


def _probe(args: Sequence[str]) -> int:
    parser = _Parser(
        prog="nativelink_worker_wrapper probe",
        usage="%(prog)s [options] -- TOOL [STARTUP ARGS] [@FLAGFILE ...]",
        description="Test whether a tool is a good persistent worker: a verdict a line, and an exit code: "
        "0 it is, 1 it is one with faults, 2 it is none. It is started as TOOL [STARTUP ARGS] "
        "--persistent_worker; what the flagfiles hold is the request that every check sends, some 300 times.",
    )
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON")
    parser.add_argument("--input", action="append", default=[], metavar="FILE", help="sent with its digest")
    parser.add_argument(
        "--touch", action="append", default=[], metavar="FILE", help="an input whose time is moved in between"
    )
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="for one answer")
    options, tool = args, []
    if "--" in args:
        at = list(args).index("--")
        options, tool = args[:at], list(args[at + 1 :])
    given = parser.parse_args(options)
    if not tool:
        parser.error("say what to probe after --")
    from wrapper.probe import options_of, run

    chosen = options_of(tool, os.getcwd(), inputs=given.input, touch=given.touch, timeout_s=given.timeout)
    return run(chosen, sys.stdout, as_json=given.json)


def _daemon_command(name: str, args: Sequence[str]) -> int:
    from wrapper import cli_daemon

    if name in ("off", "on"):
        return cli_daemon.switch(name, args, _Parser)
    commands = {
        "serve": cli_daemon.serve,
        "wait-ready": cli_daemon.wait_ready,
        "reload": cli_daemon.reload,
        "node-config": cli_daemon.node_config,
        "install-entrypoint": cli_daemon.install,
    }
    return commands[name](args, _Parser)


class _Parser(argparse.ArgumentParser):
    """argparse, but with the usual exit code for wrong usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(USAGE_EXIT_CODE, f"{self.prog}: {message} (--help explains)\n")


def _check_config(args: Sequence[str]) -> int:
    parser = _Parser(
        prog="nativelink_worker_wrapper check-config",
        description="Print the pools of a configuration with every limit in force, or what is wrong with it.",
    )
    parser.add_argument("file", metavar="FILE", help="a JSON5 file with pools")
    from wrapper.check_config import check_config

    return check_config(parser.parse_args(args).file, sys.stdout)


def _check_runtime(args: Sequence[str]) -> int:
    parser = _Parser(
        prog="nativelink_worker_wrapper check-runtime",
        description="Say what the container engine of each pool can, and what is missing: the engine itself, "
        "its network, the image, and whether a worker starts and is isolated as asked.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="a JSON5 file with pools; those with runtime cri are looked at"
    )
    given = parser.parse_args(args)
    import asyncio

    from wrapper.check_runtime import check_runtime

    return asyncio.run(check_runtime(given.file, sys.stdout))


def _parser(*, recording: bool = False) -> _Parser:
    if recording:
        parser = _Parser(
            prog="nativelink_worker_wrapper record",
            usage="%(prog)s --output FILE [options] -- TOOL [STARTUP ARGS] --persistent_worker",
            description=_RECORD_DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_recording_options(parser)
    else:
        parser = _Parser(
            prog="nativelink_worker_wrapper",
            usage="%(prog)s [options] -- TOOL [STARTUP ARGS] --persistent_worker\n"
            "       %(prog)s check-config FILE\n"
            "       %(prog)s check-runtime FILE\n"
            "       %(prog)s record --output FILE [options] -- TOOL [STARTUP ARGS] --persistent_worker",
            description=_DESCRIPTION,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    pool = parser.add_argument_group("the pool")
    pool.add_argument("--config", metavar="FILE", help="a JSON5 file with pools; its limits are the defaults")
    pool.add_argument(
        "--persistent-worker-key",
        metavar="KEY",
        default="",
        help="with --config: which pool; part of the identity of the workers",
    )
    pool.add_argument(
        "--max-instances", metavar="N", type=_positive, help="instances of the tool at most (default 10)"
    )
    pool.add_argument(
        "--idle-timeout",
        metavar="S",
        type=_seconds,
        help="seconds without work after which an instance is stopped (default 300)",
    )
    pool.add_argument(
        "--log-dir",
        metavar="DIR",
        help="write the tools' stderr to rotating files there (default: pass it on to our stderr)",
    )
    protocol = parser.add_argument_group("what the host speaks, and what the tool understands")
    protocol.add_argument(
        "--worker-protocol",
        choices=("auto", "proto", "json"),
        default="auto",
        help="format of the host's requests (default auto: found out from the first bytes)",
    )
    protocol.add_argument(
        "--tool-protocol",
        choices=("proto", "json"),
        help="format that the tool understands (default proto, or what --config says)",
    )
    protocol.add_argument(
        "--tool-multiplex",
        metavar="N",
        nargs="?",
        type=_positive,
        const=8,
        help="the tool takes N requests at a time (8 if N is not given)",
    )
    protocol.add_argument(
        "--tool-sandbox", action="store_true", help="the tool works in a request's sandbox_dir"
    )
    protocol.add_argument("--tool-cancel", action="store_true", help="the tool answers cancel requests")
    protocol.add_argument(
        "--language",
        choices=("auto", "jvm", "nodejs", "custom"),
        default="auto",
        help="how the tool's garbage is collected (default auto: by the program's name)",
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr; twice: all")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def _add_recording_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the record file")
    group.add_argument("--output", metavar="FILE", required=True, help="where to write it, when all is over")
    group.add_argument(
        "--max-requests",
        metavar="N",
        type=_positive,
        default=50,
        help="record so many requests at most (default 50)",
    )
    group.add_argument(
        "--max-bytes",
        metavar="N",
        type=_positive,
        default=256 << 20,
        help="bytes of input files at most, each content counted once (default 268435456)",
    )
    group.add_argument(
        "--trust-domain",
        metavar="NAME",
        default="",
        help="whose requests these are: workers of another trust domain are not primed with them",
    )


def _worker_mode(args: list[str], *, recording: bool = False) -> int:
    separator = args.index("--") if "--" in args else len(args)
    parser = _parser(recording=recording)
    given = parser.parse_args(args[:separator])
    tool = args[separator + 1 :]
    logging.basicConfig(
        stream=sys.stderr,
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(given.verbose, 2)],
        format="nativelink_worker_wrapper: %(message)s",
    )
    pool, total, state_dir = _configured(given)
    if not tool and pool is not None and pool.worker_command:
        tool = [*pool.worker_command]
    elif not tool:
        parser.error("no tool given: put it after --")
    elif PERSISTENT_WORKER not in tool and recording:
        parser.error(f"a tool without {PERSISTENT_WORKER} gets no requests that could be recorded")
    elif PERSISTENT_WORKER not in tool:
        from wrapper.one_shot import run_once

        run_once(tool)
    from wrapper.event_loop import run
    from wrapper.runtimes import runtime_of
    from wrapper.worker_mode import serve

    options = _options(given, tool, pool, total)
    forward = None if given.log_dir is not None else sys.stderr.fileno()
    runtime = runtime_of(pool, state_dir, log_dir=given.log_dir, forward_stderr_to=forward)
    recorder = None
    if recording:
        from wrapper.record import Recorder

        recorder = Recorder(
            given.output,
            tool=os.path.basename(tool[0]),
            trust_domain=given.trust_domain,
            max_requests=given.max_requests,
            max_bytes=given.max_bytes,
            cwd=options.cwd,
        )
    gc.freeze()  # what was imported stays: no collection needs to look at it
    gc.enable()
    return run(serve(options, runtime, recorder))


def _options(
    given: argparse.Namespace, tool: list[str], pool: PoolConfig | None, total: TotalLimits
) -> WorkerModeOptions:
    from dataclasses import replace

    from wrapper.action_runner import ToolAbilities
    from wrapper.pool.settings import PoolSettings
    from wrapper.runtime.base import Language
    from wrapper.runtime.spawn import resolve_program
    from wrapper.worker_mode import WorkerModeOptions
    from wrapper.worker_protocol.wire_format import WireFormat

    # Without a configuration nobody but the host knows how long a request may wait.
    unconfigured = PoolSettings(name="worker-mode", acquire_timeout_s=None)
    settings = unconfigured if pool is None else pool.settings()
    limits = settings.limits
    if pool is None or pool.worker_command != tuple(tool):
        limits = replace(limits, min_warm_workers=0)  # what the pool keeps warm is not this tool
    if given.max_instances is not None:
        limits = replace(
            limits,
            max_instances_per_key=given.max_instances,
            max_workers=max(limits.max_workers, given.max_instances),
            min_warm_workers=min(limits.min_warm_workers, given.max_instances),
        )
    if given.idle_timeout is not None:
        limits = replace(limits, idle_timeout_s=given.idle_timeout)
    if given.tool_multiplex is not None:
        limits = replace(limits, max_requests_per_worker_at_once=given.tool_multiplex)
    env = {**os.environ, **(dict(pool.env) if pool is not None else {})}
    cwd = os.getcwd()
    in_container = settings.execroot.in_container
    program = tool[0] if in_container else resolve_program(tool[0], env, cwd)
    language = settings.language
    if given.language != "auto":
        language = Language(given.language)
    elif pool is None:
        names = {"java": Language.JVM, "node": Language.NODEJS, "nodejs": Language.NODEJS}
        language = names.get(os.path.basename(program), Language.CUSTOM)
    tool_protocol = given.tool_protocol or (pool.worker_protocol if pool is not None else "proto")
    return WorkerModeOptions(
        argv=(program, *tool[1:]),
        settings=replace(settings, limits=limits, language=language),
        env=env,
        cwd=cwd,
        persistent_worker_key=given.persistent_worker_key,
        upstream_format=None if given.worker_protocol == "auto" else WireFormat(given.worker_protocol),
        tool_format=WireFormat(tool_protocol),
        tool=ToolAbilities(
            multiplex=limits.max_requests_per_worker_at_once > 1,
            sandbox=given.tool_sandbox,
            cancel=given.tool_cancel,
        ),
        total=total,
        check_health=pool is not None and pool.check_health,
    )


def _configured(given: argparse.Namespace) -> tuple[PoolConfig | None, TotalLimits, str | None]:
    """The pool of --config that is meant, None without one; the limits over all pools; `state_dir`."""
    from wrapper.pool.limits import TotalLimits

    if given.config is None:
        return None, TotalLimits(), None
    from wrapper.config import load_config

    config = load_config(given.config)
    key = given.persistent_worker_key
    pool = config.pool_for_key(key) if key else None
    if pool is None and not key and len(config.pools) == 1:
        pool = config.pools[0]
    if pool is None:
        served = "; ".join(f"{pool.name}: {', '.join(pool.keys) or 'no keys'}" for pool in config.pools)
        asked = f"persistentWorkerKey {key!r}" if key else "requests without a key (--persistent-worker-key)"
        raise ConfigError(f"{given.config}: no pool serves {asked}. Pools and their keys: {served}")
    if pool.runtime == "cri":
        from wrapper.runtimes import in_place

        pool = in_place(pool, os.getcwd())
    return pool, config.total_limits(), config.state_dir


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return number
