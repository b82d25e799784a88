"""Which actions are a worker's, and how they are split: real command lines, and what could be mistaken."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper.action import (
    MAX_TOOL_PATTERN,
    ActionRules,
    OneShot,
    WorkerCall,
    classify,
    is_warm,
)
from wrapper.config import parse_config
from wrapper.flagfiles import Argument

BAZEL_KEY = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@dataclass(frozen=True)
class Action:
    argv: tuple[str, ...]
    key: str = "constant"
    tool: str = ""
    protocol: str = ""


def action(command: str, **fields: str) -> Action:
    return Action(tuple(shlex.split(command)), **fields)


def rules(pool: str = "worker_command: []", actions: str = "") -> ActionRules:
    document = f'{{pools: [{{name: "p", language: "jvm", keys: ["*"], {pool}}}], actions: {{{actions}}}}}'
    return ActionRules.from_config(parse_config(document, "test"))


def call(asked: Action, by: ActionRules | None = None) -> WorkerCall:
    found = classify(asked, by or rules())
    assert isinstance(found, WorkerCall), found
    return found


def reason(asked: Action, by: ActionRules | None = None) -> str:
    found = classify(asked, by or rules())
    assert isinstance(found, OneShot), found
    return found.reason


def request_of(found: WorkerCall) -> list[str]:
    """Flagfiles to be expanded in angle brackets."""
    return [f"<{one.text}>" if one.expand else one.text for one in found.arguments]


# ---- real command lines of workers ---------------------------------------------------------------------

JAVAC = (
    "external/local_jdk/bin/java -XX:-CompactStrings "
    "--add-exports=jdk.compiler/com.sun.tools.javac.api=ALL-UNNAMED "
    "--add-opens=java.base/java.nio=ALL-UNNAMED "
    "--patch-module=jdk.compiler=external/remote_java_tools/java_tools/jdk_compiler.jar"
)
PARAMS = "@bazel-out/k8-fastbuild/bin/ex/liba.jar-0.params @bazel-out/k8-fastbuild/bin/ex/liba.jar-1.params"
OLD_JAVAC = "/usr/bin/java -XX:+UseParallelOldGC -jar external/bazel_tools/tools/jdk/JavaBuilder_deploy.jar"
ECJ = (
    "/opt/jdk/bin/java -Xlog:all=warning:stderr:uptime,level,tags "
    "-jar external/bazel_jdt_java_toolchain/compiler/export/JdtJavaBuilder_deploy.jar"
)
ROLLUP = "bazel-out/host/bin/external/npm/@bazel/rollup/bin/rollup-worker.sh"
SCALAC = "bazel-out/k8-opt-exec/bin/external/io_bazel_rules_scala/src/java/io/bazel/rulesscala/scalac"
KOTLIN = "bazel-out/k8-opt-exec-ST-d57f47055a04/bin/external/rules_kotlin~/src/main/kotlin"
TSC = "bazel-out/host/bin/external/npm/@bazel/concatjs/bin/tsc_wrapped.sh"

WORKERS = {
    "JavaBuilder with two flagfiles": (
        f"{JAVAC} -jar external/remote_java_tools/java_tools/JavaBuilder_deploy.jar {PARAMS}",
        f"{JAVAC} -jar external/remote_java_tools/java_tools/JavaBuilder_deploy.jar",
        [f"<{one}>" for one in PARAMS.split()],
        ("JavaBuilder", "proto", "never"),
    ),
    "JavaBuilder with one": (
        f"{OLD_JAVAC} @bazel-out/arm/bin/lib.params",
        OLD_JAVAC,
        ["<@bazel-out/arm/bin/lib.params>"],
        ("JavaBuilder", "proto", "never"),
    ),
    "JavaBuilder as a program": (
        "external/remote_java_tools_linux/java_tools/JavaBuilder @a-0.params @a-1.params",
        "external/remote_java_tools_linux/java_tools/JavaBuilder",
        ["<@a-0.params>", "<@a-1.params>"],
        ("JavaBuilder", "proto", "never"),
    ),
    "VanillaJavaBuilder": (
        "/usr/bin/java -jar external/remote_java_tools/java_tools/VanillaJavaBuilder_deploy.jar @a.params",
        "/usr/bin/java -jar external/remote_java_tools/java_tools/VanillaJavaBuilder_deploy.jar",
        ["<@a.params>"],
        ("JavaBuilder", "proto", "never"),
    ),
    "Eclipse's compiler": (
        f"{ECJ} @a-0.params @a-1.params",
        ECJ,
        ["<@a-0.params>", "<@a-1.params>"],
        ("JdtJavaBuilder", "proto", "auto"),
    ),
    "scalac of rules_scala": (
        f"{SCALAC}/scalac --jvm_flag=-Xmx2g --jvm_flag=-Xss8m @bazel-out/k8-fastbuild/bin/a.jar-0.params",
        f"{SCALAC}/scalac --jvm_flag=-Xmx2g --jvm_flag=-Xss8m",
        ["<@bazel-out/k8-fastbuild/bin/a.jar-0.params>"],
        ("scalac", "proto", "auto"),
    ),
    "scalac of one Scala version": (
        f"{SCALAC}/scalac_2_13_16 @a.jar-0.params",
        f"{SCALAC}/scalac_2_13_16",
        ["<@a.jar-0.params>"],
        ("scalac", "proto", "auto"),
    ),
    "the Kotlin builder, which reads its flagfile itself": (
        f"{KOTLIN}/build '--flagfile=bazel-out/k8-fastbuild/bin/lib/main_kt-kt.jar-0.params'",
        f"{KOTLIN}/build",
        ["--flagfile=bazel-out/k8-fastbuild/bin/lib/main_kt-kt.jar-0.params"],
        ("kotlin_builder", "proto", "auto"),
    ),
    "tsc_wrapped, whose flagfile Bazel is not to expand": (
        f"{TSC} --node_options=--max-old-space-size=4096 @@bazel-out/k8/bin/app/lib_es5_tsconfig.json",
        f"{TSC} --node_options=--max-old-space-size=4096",
        ["@@bazel-out/k8/bin/app/lib_es5_tsconfig.json"],
        ("tsc_wrapped", "proto", "always"),
    ),
    "the rollup worker": (
        f"{ROLLUP} @bazel-out/k8-fastbuild/bin/b.params",
        ROLLUP,
        ["<@bazel-out/k8-fastbuild/bin/b.params>"],
        ("rollup_worker", "proto", "always"),
    ),
    "the rollup worker under node": (
        "/usr/bin/node --expose-gc node_modules/@bazel/rollup/index.js @b.params",
        "/usr/bin/node --expose-gc node_modules/@bazel/rollup/index.js",
        ["<@b.params>"],
        ("rollup_worker", "proto", "always"),
    ),
    "the example of this repository": (
        "java -cp classes:lib.jar javaworker.Main @request.params",
        "java -cp classes:lib.jar javaworker.Main",
        ["<@request.params>"],
        ("example_java_worker", None, "never"),
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_well_known_worker_is_recognised_and_its_command_line_split_as_bazel_does(name: str) -> None:
    command, startup, request, known = WORKERS[name]
    found = call(action(command))
    assert found.startup == tuple(shlex.split(startup))
    assert request_of(found) == request
    assert (found.tool, found.protocol, found.digests) == known


# ---- real command lines that are no workers' -----------------------------------------------------------

ONE_SHOTS = [
    "/usr/bin/gcc @bazel-out/k8-fastbuild/bin/app/main-2.params",
    "external/local_config_cc/cc_wrapper.sh @bazel-out/darwin-fastbuild/bin/app/app-2.params",
    "/usr/bin/ld.gold @a.params",
    "/usr/bin/ar @bazel-out/k8-fastbuild/bin/app/libapp.a-2.params",
    "/bin/bash -c 'source external/bazel_tools/tools/genrule/genrule-setup.sh; cat a @b > c'",
    "/bin/bash -euo pipefail -c 'JavaBuilder @a.params'",
    "/bin/bash bazel-out/k8-fastbuild/bin/a.genrule_script.sh",
    "external/bazel_tools/tools/test/test-setup.sh app/app_test @args",
    "external/bazel_tools/tools/test/generate-xml.sh test.log test.xml 0.1 0",
    "bazel-out/k8-opt-exec/bin/external/com_google_protobuf/protoc @bazel-out/k8-fastbuild/bin/a.params",
    "python3 tools/gen.py @a.params",
    "/usr/bin/env python3 tools/gen.py --flagfile=a.flags",
    "external/remote_java_tools_linux/java_tools/ijar/ijar a.jar a-ijar.jar --target_label //a",
    "external/remote_java_tools_linux/java_tools/src/tools/singlejar/singlejar_local @a.jar-2.params",
    "external/local_jdk/bin/java -jar external/remote_java_tools/java_tools/GenClass_deploy.jar @a.params",
    "external/remote_java_tools_linux/java_tools/turbine_direct_graal @a-hjar.jar-0.params",
    "/usr/bin/java -jar tools/Other_deploy.jar JavaBuilder_deploy.jar @a.params",
    "/opt/scala/bin/scalac @sources",
    "/opt/kotlin/bin/kotlinc @sources",
    "node_modules/.bin/tsc -p tsconfig.json",
    "bazel-out/k8-opt-exec/bin/tools/build @a.params",
]


@pytest.mark.parametrize("command", ONE_SHOTS)
def test_a_flagfile_alone_under_a_constant_key_makes_no_worker(command: str) -> None:
    assert "is not known to be a persistent worker" in reason(action(command))


@pytest.mark.parametrize("command", ONE_SHOTS)
def test_a_tool_property_for_another_tool_makes_no_worker_either(command: str) -> None:
    assert "is not known" in reason(action(command, tool="foo_worker"))


# ---- what makes an action a worker's -------------------------------------------------------------------


def test_a_key_of_bazels_own_making_makes_any_tool_with_a_flagfile_a_worker() -> None:
    found = call(action("tools/gen --verbose @a.params", key=BAZEL_KEY))
    assert found == WorkerCall(
        ("tools/gen", "--verbose"),
        (Argument("@a.params", True),),
        None,
        "auto",
        "gen",
        "Bazel made its persistentWorkerKey",
    )


@pytest.mark.parametrize(
    "key",
    [
        BAZEL_KEY.upper(),
        BAZEL_KEY[:-1],
        BAZEL_KEY + "0",
        "g" + BAZEL_KEY[1:],
        BAZEL_KEY + "\n",
        "\u0660" * 64,
        "",
    ],
)
def test_a_key_that_only_looks_like_bazels_does_not(key: str) -> None:
    assert "is not known" in reason(action("tools/gen @a.params", key=key))


@pytest.mark.parametrize(
    ("command", "tool"),
    [
        ("a/b/gen @p", "gen"),
        ("a/b/gen @p", "a/b/gen"),
        ("a/b/gen @p", "*/gen"),
        ("a/b/gen @p", "g[ae]n"),
        ("java -jar x/Gen_deploy.jar @p", "Gen_*.jar"),
        ("java -cp x.jar com.example.Gen @p", "com.example.Gen"),
        ("java -m mod/com.example.Gen @p", "com.example.Gen"),
        ("python3.11 -X dev tools/gen.py @p", "gen.py"),
        ("python -m tools.gen @p", "tools.gen"),
        ("node -r ./hook.js tools/gen.js @p", "gen.js"),
        ("bash -o pipefail tools/gen.sh @p", "gen.sh"),
    ],
)
def test_the_tool_property_matches_what_the_tool_is_called(command: str, tool: str) -> None:
    assert f"persistentWorkerTool is '{tool}'" in call(action(command, tool=tool)).why


@pytest.mark.parametrize(
    "tool",
    [
        "*",
        "?*",
        "[a-z]*",
        "GEN",
        "b/gen",
        "gen*x",
        "@p",
        "a" * MAX_TOOL_PATTERN + "*",
        "*" * MAX_TOOL_PATTERN + "gen",
        "\x00",
    ],
)
def test_a_tool_property_that_matches_nothing_or_names_nothing_says_nothing(tool: str) -> None:
    assert "is not known" in reason(action("a/b/gen @p", tool=tool))


def test_the_tool_property_does_not_match_the_program_of_a_shells_command() -> None:
    assert "is not known" in reason(action("bash -c 'gen @p'", tool="gen"))


def test_tools_of_the_pool_and_of_all_pools_make_workers() -> None:
    pool = 'worker_command: [], tools: [{pattern: "gen", protocol: "json", digests: "always"}]'
    by = rules(pool, 'tools: [{pattern: "*_worker", protocol: "proto"}, {pattern: "g*", digests: "never"}]')
    found = call(action("a/gen @p"), by)
    assert (found.protocol, found.digests, found.tool) == ("json", "always", "gen")
    assert "pool p has 'gen'" in found.why
    found = call(action("a/my_worker @p"), by)
    assert (found.protocol, found.digests, found.tool) == ("proto", "auto", "*_worker")
    assert "actions.tools has '*_worker'" in found.why


def test_what_one_list_leaves_open_the_next_says() -> None:
    asked = action("a/JavaBuilder @p")
    assert call(asked, rules('worker_command: [], digests: "always"')).digests == "always"
    open_entry = 'tools: [{pattern: "JavaBuilder"}]'
    found = call(asked, rules("worker_command: []", open_entry))
    assert (found.tool, found.protocol, found.digests) == ("JavaBuilder", "proto", "never")
    told = 'tools: [{pattern: "JavaBuilder", protocol: "json", digests: "always"}]'
    found = call(asked, rules('worker_command: [], digests: "never"', told))
    assert (found.protocol, found.digests) == ("json", "always")


@pytest.mark.parametrize("protocol", ["proto", "json"])
def test_the_protocol_property_goes_before_what_is_known_of_the_tool(protocol: str) -> None:
    by = rules('worker_command: [], tools: [{pattern: "gen", protocol: "json"}, {pattern: "mix"}]')
    for tool in ("gen", "mix"):
        assert call(action(f"{tool} @p", protocol=protocol), by).protocol == protocol


def test_a_protocol_property_with_anything_else_is_ignored_and_said() -> None:
    found = call(action("JavaBuilder @p", protocol="JSON"))
    assert found.protocol == "proto"
    assert found.why.endswith("persistentWorkerProtocol 'JSON' is neither proto nor json: ignored")


def test_an_action_that_no_pool_serves_runs_without_a_worker() -> None:
    document = '{pools: [{name: "a", language: "jvm", keys: ["java-*"], worker_command: []}]}'
    by = ActionRules.from_config(parse_config(document, "test"))
    assert reason(action("JavaBuilder @p", key="ts-1"), by) == "no pool serves persistentWorkerKey 'ts-1'"
    assert reason(action("JavaBuilder @p", key=""), by) == "no pool serves persistentWorkerKey ''"
    assert call(action("JavaBuilder @p", key="java-17"), by).tool == "JavaBuilder"


def test_a_tool_of_one_pool_is_none_of_anothers() -> None:
    document = """{pools: [
        {name: "a", language: "jvm", keys: ["a"], worker_command: [], tools: [{pattern: "gen"}]},
        {name: "b", language: "jvm", keys: ["b"], worker_command: [], tools: [{pattern: "mix"}]},
    ]}"""
    by = ActionRules.from_config(parse_config(document, "test"))
    assert call(action("gen @p", key="a"), by).tool == "gen"
    assert "is not known" in reason(action("gen @p", key="b"), by)


# ---- splitting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "request_has"),
    [
        ("@a", "<@a>"),
        ("@@a", "@@a"),
        ("@repo//pkg:target", "@repo//pkg:target"),
        ("@@repo//pkg:target", "@@repo//pkg:target"),
        ("--flagfile=a", "--flagfile=a"),
        ("-flagfile=a", "-flagfile=a"),
        ("@/etc/shadow", "<@/etc/shadow>"),
    ],
)
def test_an_argument_of_the_request_is_taken_as_bazel_takes_it(argument: str, request_has: str) -> None:
    found = call(Action(("JavaBuilder", argument)))
    assert (found.startup, request_of(found)) == (("JavaBuilder",), [request_has])


@pytest.mark.parametrize(
    "argument", ["@", "--flagfile=", "--flagfile", "flagfile=a", "---flagfile=a", "x@a", "@a\nb"]
)
def test_an_argument_that_is_no_flagfile_starts_the_worker(argument: str) -> None:
    found = call(Action(("JavaBuilder", argument, "@p")))
    assert (found.startup, request_of(found)) == (("JavaBuilder", argument), ["<@p>"])


def test_what_stands_behind_a_flagfile_starts_the_worker_too() -> None:
    found = call(action("JavaBuilder -a @p -b @q -c"))
    assert (found.startup, request_of(found)) == (("JavaBuilder", "-a", "-b", "-c"), ["<@p>", "<@q>"])


def test_without_a_flagfile_there_is_no_request() -> None:
    assert "no argument is a flagfile" in reason(action("JavaBuilder --output a.jar", key=BAZEL_KEY))


def test_argument_files_of_the_java_launcher_start_the_worker() -> None:
    head = "java @jvm.options -cp a @more.options -jar x/JavaBuilder_deploy.jar"
    found = call(action(f"{head} @p"))
    assert found.startup == tuple(head.split())
    assert request_of(found) == ["<@p>"]


@pytest.mark.parametrize(
    "command", ["java @all.options", "java -cp a -jar", "java -cp", "python3", "node --inspect"]
)
def test_an_interpreter_that_runs_nothing_that_can_be_seen_is_no_worker(command: str) -> None:
    assert "is not to be seen in the command line" in reason(action(command, key=BAZEL_KEY))


def test_a_command_line_that_starts_a_worker_itself_is_left_alone() -> None:
    assert "--persistent_worker itself" in reason(action("JavaBuilder @p --persistent_worker", key=BAZEL_KEY))


def test_an_empty_command_line_is_no_worker() -> None:
    assert reason(Action(())) == "the command line is empty"


def test_a_request_that_the_protocol_cannot_express_is_not_made() -> None:
    bad = "\udcff"
    assert "not UTF-8" in reason(Action(("JavaBuilder", f"--flagfile={bad}")))
    # What starts the worker, and the names of files, may be anything.
    found = call(Action(("JavaBuilder", bad, f"@{bad}")))
    assert (found.startup, request_of(found)) == (("JavaBuilder", bad), [f"<@{bad}>"])


words = st.text(st.sampled_from("@-=/ab.flagie\n"), max_size=12) | st.sampled_from(
    ["@x", "@@x", "@r//x", "--flagfile=x", "-flagfile=x", "--persistent_worker", "java", "-jar"]
)


@given(st.lists(words, max_size=8))
def test_no_argument_is_lost_doubled_or_moved_within_its_part(rest: list[str]) -> None:
    asked = Action(("tool", *rest), key=BAZEL_KEY)
    found = classify(asked, RULES)
    bazels = re.compile(r"(?:@|--?flagfile=)(.+)")
    if isinstance(found, OneShot):
        assert "--persistent_worker" in rest or not any(bazels.fullmatch(word) for word in rest)
        return
    assert found.startup == ("tool", *(word for word in rest if not bazels.fullmatch(word)))
    assert [one.text for one in found.arguments] == [word for word in rest if bazels.fullmatch(word)]
    for one in found.arguments:
        assert one.expand == (one.text[0] == "@" and one.text[1] != "@" and "//" not in one.text)


RULES = rules()


# ---- pools with a worker of their own ------------------------------------------------------------------

OWN = 'worker_command: ["java", "-Xmx1g", "-jar", "/opt/JavaBuilder_deploy.jar", "--persistent_worker"]'


def test_a_pools_own_worker_serves_actions_of_the_same_well_known_tool() -> None:
    command, _, request, _ = WORKERS["JavaBuilder with two flagfiles"]
    found = call(action(command), rules(OWN))
    assert found.startup == ("java", "-Xmx1g", "-jar", "/opt/JavaBuilder_deploy.jar", "--persistent_worker")
    assert request_of(found) == request
    assert found.protocol == "proto"


@pytest.mark.parametrize(
    "asked",
    [
        action("java -jar x/VanillaJavaBuilder_deploy.jar @p"),
        action("a/JavaBuilder @p"),
        action(f"{SCALAC}/scalac @p"),
        action("tools/gen @p", key=BAZEL_KEY),
        action("gcc @p"),
    ],
)
def test_a_pools_own_worker_gets_no_action_of_another_tool(asked: Action) -> None:
    assert "is not known to be the tool of the worker_command of pool p" in reason(asked, rules(OWN))


def test_workers_of_two_versions_are_not_one_tool_though_one_pattern_has_both() -> None:
    own = 'worker_command: ["/opt/io/bazel/rulesscala/scalac/scalac_2_12_20", "--persistent_worker"]'
    assert "is not known" in reason(action(f"{SCALAC}/scalac_2_13_16 @p"), rules(own))
    assert call(action(f"{SCALAC}/scalac_2_12_20 @p"), rules(own)).tool == "scalac"
    globally = 'tools: [{pattern: "*_worker"}]'
    own = 'worker_command: ["/opt/a_worker"]'
    assert "is not known" in reason(action("b_worker @p"), rules(own, globally))
    assert call(action("x/a_worker @p"), rules(own, globally)).tool == "*_worker"


def test_tools_of_the_pool_say_what_its_own_worker_serves() -> None:
    by = rules('worker_command: ["/opt/worker"], tools: [{pattern: "javac"}], worker_protocol: "json"')
    found = call(action("/usr/bin/javac -d out Foo.java @sources"), by)
    assert (found.startup, found.protocol) == (("/opt/worker",), "json")
    assert request_of(found) == ["-d", "out", "Foo.java", "<@sources>"]
    assert "is not known" in reason(action("/usr/bin/jar cf a.jar", tool="jar"), by)


def test_any_tool_is_allowed_where_the_key_says_it_all() -> None:
    by = rules('worker_command: ["/opt/worker"], tools: [{pattern: "*"}]')
    assert request_of(call(action("anything a b"), by)) == ["a", "b"]
    assert request_of(call(action("anything"), by)) == []


def test_the_tool_property_says_it_for_a_pool_without_tools() -> None:
    by = rules('worker_command: ["/opt/worker"]')
    assert request_of(call(action("javac -d out Foo.java", tool="javac"), by)) == ["-d", "out", "Foo.java"]


def test_the_protocol_of_a_pools_own_worker_is_the_pools() -> None:
    assert (
        call(action("java -jar JavaBuilder_deploy.jar @p", protocol="json"), rules(OWN)).protocol == "proto"
    )


@pytest.mark.parametrize(
    ("command", "request_has"),
    [
        ("gen --strict @p", ["--strict", "<@p>"]),
        ("gen --mode fast @p", ["<@p>"]),
        ("gen --mode slow @p", ["--mode", "slow", "<@p>"]),
        ("gen --mode @p fast", ["--mode", "<@p>", "fast"]),
        ("gen @p --mode fast", ["<@p>", "--mode", "fast"]),
        ("gen --jvm_flag=-Xmx1g --mode fast @p", ["<@p>"]),
        ("gen --wrapper_script_flag=--debug --node_options=--x --jvm_flags=-a @@p", ["@@p"]),
    ],
)
def test_nothing_that_bears_on_the_outputs_is_left_out_of_the_request(
    command: str, request_has: list[str]
) -> None:
    own = 'worker_command: ["/opt/gen", "--mode", "fast", "--persistent_worker"]'
    by = rules(f'{own}, tools: [{{pattern: "gen"}}]')
    assert request_of(call(action(command), by)) == request_has


def test_with_a_worker_of_the_pools_own_the_action_is_to_name_its_tool_too() -> None:
    by = rules('worker_command: ["/opt/worker"], tools: [{pattern: "*"}]')
    assert "is not to be seen" in reason(action("java @all"), by)
    assert request_of(call(action("java -cp a -Dx=y Main @p b"), by)) == ["<@p>", "b"]


# ---- which actions are kept away -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    ["constant", "JavaBuilder", "--stamp", "@bazel-out/k8-opt/*", "*k8-opt*"],
)
def test_never_warm_matches_the_key_the_program_and_every_argument(pattern: str) -> None:
    by = rules("worker_command: []", f'never_warm: ["nothing", "{pattern}"]')
    asked = action("JavaBuilder --stamp @bazel-out/k8-opt/bin/a.params")
    assert reason(asked, by) == f"never_warm has '{pattern}'"
    assert call(action("x/JavaBuilder @bazel-out/k8-dbg/bin/a.params", key="other"), by)


@pytest.mark.parametrize("pattern", ["k8-opt", "stamp", "Constant", "opt*"])
def test_never_warm_matches_whole_arguments_only(pattern: str) -> None:
    by = rules("worker_command: []", f'never_warm: ["{pattern}"]')
    assert call(action("JavaBuilder --stamp @bazel-out/k8-opt/bin/a.params"), by)


def test_what_is_too_long_to_be_searched_is_taken_to_be_never_warm() -> None:
    by = rules("worker_command: []", 'never_warm: ["release"]')
    for padding in (("x" * 5000,), tuple("y" * 3000 for _ in range(30))):
        assert "too long to be searched" in reason(Action(("JavaBuilder", *padding, "@p")), by)
        assert call(Action(("JavaBuilder", *padding, "@p")))


@given(st.floats(0, 1), st.floats(0, 1), st.text(), st.lists(st.text(), min_size=1))
def test_an_action_that_is_warm_at_a_fraction_is_so_at_every_greater_one(
    one: float, other: float, key: str, argv: list[str]
) -> None:
    asked = Action(tuple(argv), key=key)
    low, high = sorted((one, other))
    assert is_warm(asked, low) <= is_warm(asked, high)
    assert is_warm(asked, low) == is_warm(replace(asked), low)
    assert is_warm(asked, 1.0)
    assert not is_warm(asked, 0.0)


def test_about_the_fraction_of_actions_is_warm() -> None:
    warm = sum(is_warm(Action(("tool", f"@{n}.params")), 0.3) for n in range(10_000))
    assert 2_800 < warm < 3_200


def test_the_fraction_goes_by_the_whole_command_line_and_the_key() -> None:
    asked = [
        Action(("a", "bc")),
        Action(("ab", "c")),
        Action(("a", "b", "c")),
        Action(("a", "bc"), key="other"),
        Action(("a", "\udcff")),
    ]
    decisions = {tuple(is_warm(one, n / 64) for n in range(64)) for one in asked}
    assert len(decisions) == len(asked)


# ---- hostile values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "k" * 4096},
        {"tool": "*a" * 128},
        {"tool": "[" * 256},
        {"tool": "[!]" * 80 + "x"},
        {"protocol": "p" * 4096},
        {"argv": ("x" * 1_000_000, "@p")},
        {"argv": ("java", *("-a",) * 65_000, "@p")},
        {"argv": ("java", "-jar", "x" * 1_000_000, "@p")},
        {"argv": ("", "@p")},
        {"argv": ("tool/", "@p")},
        {"argv": ("\udcff", "@p")},
    ],
)
def test_no_value_of_an_action_makes_classification_fail(fields: Any) -> None:
    by = rules('worker_command: [], tools: [{pattern: "*x*y"}, {pattern: "a"}]', 'never_warm: ["*r?l*"]')
    asked = replace(action("tool @p"), **fields)
    found = classify(asked, by)
    text = found.reason if isinstance(found, OneShot) else found.why
    assert len(text) < 1000
