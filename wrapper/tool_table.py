"""The well-known persistent workers that this product recognises without being told.

Owns the table only. Each entry says how the tool is called (shell patterns of the program's path or base
name, or of what an interpreter is told to run: see `tool_names.py`), which protocol it speaks, and whether it
needs the digests of its inputs. All take their requests from flagfiles at the end of the command line.

Only tools whose source, or a trial, shows that they speak the protocol are listed. Not here on purpose: ijar,
singlejar, GenClass and turbine, which are no workers, and programs of too common a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WireProtocol = Literal["proto", "json"]
Digests = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class KnownTool:
    name: str
    patterns: tuple[str, ...]
    protocol: WireProtocol | None
    """None: found out."""
    digests: Digests
    source: str
    """How it is known."""


KNOWN_TOOLS = (
    KnownTool(
        "JavaBuilder",
        (
            "JavaBuilder_deploy.jar",
            "VanillaJavaBuilder_deploy.jar",
            "JavaBuilder",
            "VanillaJavaBuilder",
            "com.google.devtools.build.buildjar.BazelJavaBuilder",
            "com.google.devtools.build.buildjar.VanillaJavaBuilder",
        ),
        "proto",
        "never",
        "Bazel's java_tools: tried, and read",
    ),
    KnownTool(
        "JdtJavaBuilder",
        ("JdtJavaBuilder_deploy.jar", "com.salesforce.bazel.jdt.toolchain.builder.JdtJavaBuilder"),
        "proto",
        "auto",
        "bazel_jdt_java_toolchain: read",
    ),
    KnownTool(
        "ResourceProcessorBusyBox",
        ("ResourceProcessorBusyBox", "com.google.devtools.build.android.ResourceProcessorBusyBox"),
        "proto",
        "auto",
        "Bazel's Android tools: read",
    ),
    KnownTool(
        "scalac",
        ("*/io/bazel/rulesscala/scalac/scalac*", "io.bazel.rulesscala.scalac.ScalacWorker"),
        "proto",
        "auto",
        "rules_scala: its rule read",
    ),
    KnownTool(
        "scala_instrumenter",
        ("*/io/bazel/rulesscala/coverage/instrumenter/instrumenter",),
        "proto",
        "auto",
        "rules_scala: its rule read",
    ),
    KnownTool(
        "kotlin_builder",
        (
            "*rules_kotlin*/src/main/kotlin/build",
            "*rules_kotlin*/src/main/kotlin/jdeps_merger",
            "io.bazel.kotlin.builder.KotlinBuilderMain",
            "io.bazel.kotlin.builder.cmd.Build",
            "io.bazel.kotlin.builder.cmd.MergeJdeps",
        ),
        "proto",
        "auto",
        "rules_kotlin: its rule read; takes --flagfile=FILE, which it reads itself",
    ),
    KnownTool(
        "tsc_wrapped",
        ("tsc[-_]wrapped", "tsc[-_]wrapped.sh", "tsc[-_]wrapped.js", "tsc[-_]wrapped_bin*"),
        "proto",
        "always",
        "npm @bazel/concatjs: tried; takes @@FILE, which it reads itself, and fails without digests",
    ),
    KnownTool(
        "rollup_worker",
        ("rollup-worker", "rollup-worker.sh", "rollup-worker.js", "*/@bazel/rollup/index.js"),
        "proto",
        "always",
        "npm @bazel/rollup: tried; keeps parsed modules by digest",
    ),
    KnownTool(
        "example_java_worker",
        ("javaworker.Main",),
        None,
        "never",
        "examples/java-persistent-worker: proto, or JSON if it is told so",
    ),
)
