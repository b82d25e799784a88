"""Bazel's own JavaBuilder as the tool of actions, brought along with their inputs, through a whole node."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.e2e.driver import fetched, java_builder_command
from tests.node.node import NodeAction
from tests.node.warm_node import KEY, WarmNode
from tests.support.action_world import needs_root

from fetch_java_tools import java_builder  # isort: skip  # the driver has put tools/ on sys.path

pytestmark = [pytest.mark.e2e, needs_root]

JAR = "external/java_tools/JavaBuilder_deploy.jar"


def compile_action(number: int, jar: bytes) -> NodeAction:
    """As Bazel sends it: two flagfiles, the tool among the inputs, outputs beside each other."""
    java = shutil.which("java")
    assert java is not None
    source, output = f"pkg/C{number}.java", f"bazel-out/k8/bin/pkg/libc{number}.jar"
    first = ["--output", output, "--native_header_output", output.replace(".jar", "-native.jar")]
    first += ["--output_manifest_proto", f"{output}_manifest_proto"]
    second = ["--sources", source, "--javacopts", "-source", "17", "-target", "17", "--"]
    second += ["--target_label", f"//pkg:c{number}", "--reduce_classpath_mode", "NONE"]
    text = f"package pkg; public class C{number} {{ public static int n() {{ return {number}; }} }}\n"
    inputs = {
        JAR: jar,
        source: text.encode(),
        f"{output}-0.params": "".join(f"{line}\n" for line in first).encode(),
        f"{output}-1.params": "".join(f"{line}\n" for line in second).encode(),
    }
    argv = [*java_builder_command(java, JAR), f"@{output}-0.params", f"@{output}-1.params"]
    return NodeAction(argv, inputs, outputs=[output, f"{output}_manifest_proto"], properties=KEY)


def classes_of(jar: bytes | str) -> dict[str, bytes]:
    assert isinstance(jar, bytes)
    with zipfile.ZipFile(io.BytesIO(jar)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".class")}


def test_one_warm_javabuilder_compiles_action_after_action_as_a_process_each_does() -> None:
    jar = Path(fetched(java_builder)).read_bytes()
    with WarmNode({"language": "jvm", "tools": []}) as warm:
        for number in range(12):
            action = compile_action(number, jar)
            result = warm.node.run(action)
            assert result.exit_code == 0, result
            ((name, code),) = classes_of(result.outputs[action.outputs[0]]).items()
            assert name == f"pkg/C{number}.class"
            if number < 2:
                plain = warm.plain.run(action)
                assert classes_of(plain.outputs[action.outputs[0]]) == {name: code}
        assert warm.daemon.log.read_text().count("worker started") == 1


def test_a_compile_error_is_the_actions_own_and_the_worker_stays() -> None:
    jar = Path(fetched(java_builder)).read_bytes()
    with WarmNode({"language": "jvm", "tools": []}) as warm:
        good, bad = compile_action(1, jar), compile_action(2, jar)
        bad.inputs = {**bad.inputs, "pkg/C2.java": b"class C2 { int n() { return nothing; } }\n"}
        assert warm.node.run(good).exit_code == 0
        result = warm.node.run(bad)
        assert result.exit_code == 1
        assert b"cannot find symbol" in result.stderr
        assert warm.node.run(good).exit_code == 0
        assert warm.daemon.log.read_text().count("worker started") == 1
