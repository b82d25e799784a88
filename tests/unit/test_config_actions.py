"""The `actions` section and what pools say of actions: its meaning, and what is wrong with it."""

from __future__ import annotations

import io
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper.action import ActionRules
from wrapper.check_config import check_config
from wrapper.config import Config, parse_config
from wrapper.errors import ConfigError

POOL = '{name: "a", language: "jvm", keys: ["*"], worker_command: [], '


def document(actions: str = "", pool: str = "") -> str:
    return f"{{pools: [{POOL}{pool}}}], actions: {{{actions}}}}}"


def config_of(actions: str = "", pool: str = "") -> Config:
    return parse_config(document(actions, pool), "test")


def problem_of(actions: str = "", pool: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(actions, pool)
    return caught.value.message.removeprefix("test: ")


def roots(*paths: str) -> str:
    return "work_roots: [" + ", ".join(f'{{path: "{path}"}}' for path in paths) + "]"


def test_a_document_without_actions_has_none_and_sends_all_to_workers() -> None:
    config = parse_config('{pools: [{name: "a", language: "jvm"}]}', "test")
    assert config.actions.work_roots == ()
    assert config.actions.warm
    assert config.actions.max_connections == 1024
    assert config.pools[0].warm_fraction == 1
    assert config.pools[0].digests == "auto"


def test_everything_that_can_be_said_is_read() -> None:
    config = config_of(
        """
        work_roots: [
            {path: "/var/lib/nl/one", trust_domain: "main"},
            {path: "/srv/two", execroots: "/srv/own"},
        ],
        socket_group: "nativelink",
        tools: [{pattern: "gen", protocol: "json", digests: "always"}],
        never_warm: ["*-opt*", "release"],
        max_timeout_s: 600,
        max_connections: 10,
        warm: false,
        """,
        'tools: [{pattern: "mix"}], digests: "never", warm_fraction: 0.25',
    )
    actions = config.actions
    assert [(one.path, one.trust_domain, one.execroots) for one in actions.work_roots] == [
        ("/var/lib/nl/one", "main", None),
        ("/srv/two", "", "/srv/own"),
    ]
    assert (actions.socket_group, actions.max_connections, actions.warm) == ("nativelink", 10, False)
    assert [(one.pattern, one.protocol, one.digests) for one in actions.tools] == [("gen", "json", "always")]
    pool = config.pools[0]
    assert [(one.pattern, one.protocol, one.digests) for one in pool.tools] == [("mix", None, "auto")]
    assert (pool.digests, pool.warm_fraction) == ("never", 0.25)
    rules = ActionRules.from_config(config)
    assert rules.max_timeout_s == 600
    assert rules.never_warm.patterns == ("*-opt*", "release")


@pytest.mark.parametrize(
    ("actions", "pool", "message"),
    [
        (
            'work_roots: [{path: "var/lib"}]',
            "",
            'actions.work_roots[0].path: found "var/lib"; allowed: an absolute',
        ),
        ("work_roots: [{}]", "", "actions.work_roots[0].path: must be given"),
        (roots(*(f"/r{n}" for n in range(17))), "", "allowed: a list of at most 16 directories"),
        ('work_roots: [{path: "/a", trust_domain: "a b"}]', "", "actions.work_roots[0].trust_domain: found"),
        ('work_roots: [{path: "/a", trust: "b"}]', "", "actions.work_roots[0].trust: unknown name"),
        (
            roots("/a/../b"),
            "",
            'actions.work_roots[0].path: found "/a/../b"; allowed: an absolute path without',
        ),
        (roots("/a/"), "", "without"),
        (roots("//a"), "", "without"),
        (roots("/"), "", 'actions.work_roots[0].path: found "/"; allowed: an absolute path'),
        (
            roots("/a", "/b", "/a"),
            "",
            'actions.work_roots[2].path: found "/a" beside actions.work_roots[0].path',
        ),
        (roots("/a", "/a/b"), "", "is, or lies in, another"),
        (roots("/a/b", "/a"), "", "is, or lies in, another"),
        (
            'work_roots: [{path: "/a", execroots: "/b/x"}, {path: "/b"}]',
            "",
            'actions.work_roots[0].execroots: found "/b/x", which lies in actions.work_roots[1].path ("/b")',
        ),
        ('work_roots: [{path: "/a", execroots: "/a"}]', "", "outside of all work roots"),
        ('work_roots: [{path: "/a", execroots: "/x/"}]', "", "actions.work_roots[0].execroots: found"),
        ('socket_group: ""', "", "actions.socket_group: found"),
        ('socket_group: "a b"', "", "actions.socket_group: found"),
        ('tools: [{protocol: "json"}]', "", "actions.tools[0].pattern: must be given"),
        ('tools: [{pattern: ""}]', "", "actions.tools[0].pattern: found"),
        ('tools: [{pattern: "a", protocol: "jsn"}]', "", 'did you mean "json"?'),
        ('tools: [{pattern: "a", digests: true}]', "", "actions.tools[0].digests: found true"),
        ('tools: ["a"]', "", "allowed: an object with pattern, protocol, digests"),
        ('tools: [{pattern: "*"}]', "", 'actions.tools[0].pattern: found "*", which names no tool'),
        (
            'tools: [{pattern: "a*"}, {pattern: "ab"}]',
            "",
            'actions.tools[1].pattern: found "ab", which actions.tools[0].pattern ("a*") has taken',
        ),
        ("", 'tools: [{pattern: "?*"}]', 'pools[0].tools[0].pattern: found "?*", which names no tool'),
        (
            "",
            'tools: [{pattern: "a"}, {pattern: "a"}]',
            'pools[0].tools[1].pattern: found "a", which pools[0].tools[0]',
        ),
        (
            "",
            'digests: "sometimes"',
            'found "sometimes"; allowed: "auto", "always" or "never"',
        ),
        ("", "warm_fraction: 1.5", "pools[0].warm_fraction: found 1.5; allowed: a number from 0"),
        ("", "warm_fraction: -0.1", "pools[0].warm_fraction"),
        ("", 'warm_fraction: "1"', "pools[0].warm_fraction"),
        ("", "warm_fraction: NaN", "pools[0].warm_fraction"),
        ('never_warm: "release"', "", "actions.never_warm: found"),
        ('never_warm: [""]', "", "actions.never_warm[0]: found"),
        ("max_timeout_s: 0", "", "actions.max_timeout_s: found 0"),
        ("max_connections: 0", "", "actions.max_connections: found 0"),
        ("warm: 1", "", "actions.warm: found 1; allowed: true or false"),
        ("warn: true", "", 'actions.warn: unknown name; did you mean "warm"?'),
        (
            roots("/a", "/b"),
            'execroot: {work_root: "/c"}',
            'pools[0].execroot.work_root: found "/c"; allowed: one of actions.work_roots (/a, /b), or null',
        ),
    ],
)
def test_what_is_wrong_is_said_with_path_finding_and_what_is_allowed(
    actions: str, pool: str, message: str
) -> None:
    problem = problem_of(actions, pool)
    assert message in problem
    assert "problems" not in problem, "one mistake is one problem"


@pytest.mark.parametrize(
    ("actions", "pool"),
    [
        (roots("/a", "/ab"), ""),
        (roots("/a", "/b"), 'execroot: {work_root: "/b"}'),
        (roots("/a"), 'execroot: {work_root: "/c", strategy: "link"}'),
        ("", 'execroot: {work_root: "/c"}'),
        ('work_roots: [{path: "/a/b", execroots: "/a"}]', ""),
        ('tools: [{pattern: "ab"}, {pattern: "a*"}]', 'tools: [{pattern: "ab"}]'),
        ("", "warm_fraction: 0"),
        ("", "warm_fraction: 1"),
        ("max_timeout_s: null, socket_group: null", ""),
    ],
)
def test_what_is_right_is_taken(actions: str, pool: str) -> None:
    config_of(actions, pool)


def test_a_pool_with_a_worker_of_its_own_may_take_all_tools() -> None:
    text = '{pools: [{name: "a", language: "jvm", worker_command: ["/w"], tools: [{pattern: "*"}]}]}'
    parse_config(text, "test")


def test_problems_of_actions_and_of_pools_are_said_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document(roots("/a", "/a/b"), "max_workers: 0"), "test")
    assert "actions.work_roots[1].path" in caught.value.message
    assert "pools[0].max_workers" in caught.value.message


def test_check_config_prints_the_actions(tmp_path: Path) -> None:
    file = tmp_path / "pools.json5"
    file.write_text(
        document(
            'work_roots: [{path: "/a", trust_domain: "t"}], tools: [{pattern: "x", digests: "never"}]',
            'tools: [{pattern: "y", protocol: "json"}]',
        )
    )
    out = io.StringIO()
    assert check_config(file, out) == 0
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert 'actions.work_roots /a (trust domain "t")' in lines
    assert 'actions.tools "x" (protocol found out, digests never)' in lines
    assert "actions.warm true (default)" in lines
    assert "actions.max_timeout_s no limit (default)" in lines
    assert 'tools "y" (json, digests auto)' in lines
    assert "warm_fraction 1 (default)" in lines


keys = st.text(st.sampled_from("abc-*?["), max_size=6)
patterns = st.text(st.sampled_from("abc-*?"), min_size=1, max_size=4) | st.sampled_from(
    ["[ab]c", "a[!b]*", "["]
)


@given(st.lists(st.lists(patterns, max_size=3), min_size=1, max_size=5), keys)
def test_the_pool_for_a_key_is_the_one_that_the_configuration_says(pools: list[list[str]], key: str) -> None:
    base = parse_config('{pools: [{name: "p", language: "jvm"}]}', "test").pools[0]
    made = [base.model_copy(update={"name": f"p{n}", "keys": tuple(one)}) for n, one in enumerate(pools)]
    config = Config.model_construct(pools=tuple(made), actions=config_of().actions)
    expected = next((one for one in made if any(fnmatchcase(key, p) for p in one.keys)), None)
    assert ActionRules.from_config(config).pool_for(key) is expected
    assert config.pool_for_key(key) is expected
