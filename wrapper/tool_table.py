"""The well-known persistent workers that this product recognises without being told.

Owns the table only. Each entry says how the tool is called (shell patterns of the program's path or base
name, or of what `java` is told to run: see `tool_names.py`), which protocol it speaks, and whether it needs
the digests of its inputs. All of them take their request from flagfiles at the end of the command line.

Only tools whose source, or a trial, shows that they speak the protocol are listed. What is not: JavaBuilder's
helpers (GenClass, ijar, singlejar, turbine as a native image), protoc, the C++ and Python tools.
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
            "JdtJavaBuilder_deploy.jar",
            "JavaBuilder",
            "com.google.devtools.build.buildjar.BazelJavaBuilder",
            "com.google.devtools.build.buildjar.VanillaJavaBuilder",
        ),
        "proto",
        "never",
        "Bazel's java_tools, tried; the Jdt one of salesforce/bazel-jdt-java-toolchain",
    ),
    KnownTool(
        "Turbine",
        ("turbine_direct_deploy.jar", "Turbine_deploy.jar", "com.google.turbine.main.Main"),
        None,
        "never",
        "Bazel's header compiler as a JAR; its trial run decides, since not every version is a worker",
    ),
)
