"""Many patterns at once find what each of them alone would."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wrapper.patterns import LONGEST_NAME, Names, PatternIndex, names_something

letters = st.sampled_from("aabbc/.é")
names = st.text(letters, max_size=12)
pieces = st.one_of(
    letters, st.sampled_from(["*", "?", "[ab]", "[!a]", "[", "]", "[]", "[]a]", "[!", "aabb", "a.b"])
)
patterns = st.lists(pieces, max_size=6).map("".join)


@given(st.lists(patterns, max_size=8), st.lists(names, min_size=1, max_size=4))
@example(["[a", "*"], ["[a"])
@example(["*aabb*"], ["xaab", "bx"])
@example(["**"], [""])
def test_the_first_pattern_that_matches_any_of_the_names_is_found(many: list[str], any_of: list[str]) -> None:
    expected = [
        place for place, pattern in enumerate(many) if any(fnmatchcase(name, pattern) for name in any_of)
    ]
    assert PatternIndex(many).first(Names(any_of)) == next(iter(expected), None)


@given(st.lists(patterns, min_size=1, max_size=3), st.lists(names, min_size=1, max_size=60))
def test_a_long_list_of_names_is_searched_the_other_way_with_the_same_result(
    many: list[str], any_of: list[str]
) -> None:
    """Few patterns are looked for in many names, many patterns by the names' pieces."""
    padding = [f"none-{n}" for n in range(200)]
    few = PatternIndex(many)
    more = PatternIndex([*many, *(f"never-{n}-*" for n in range(500))])
    assert few.first(Names([*any_of, *padding])) == few.first(Names(any_of)) or "*" in "".join(many)
    assert more.first(Names([*any_of, *padding])) == few.first(Names([*any_of, *padding]))


def test_the_order_of_the_patterns_counts_and_not_that_of_the_names() -> None:
    assert PatternIndex(["b", "a"]).first(Names(["a", "b"])) == 0
    assert PatternIndex(["b*", "a"]).first(Names(["a", "b"])) == 0
    assert PatternIndex(["b", "a*"]).first(Names(["a", "b"])) == 0


def test_case_matters_and_a_pattern_matches_the_whole_name() -> None:
    index = PatternIndex(["Java*", "*.jar"])
    assert index.first(Names(["java"])) is None
    assert index.first(Names(["x.jar.gz"])) is None
    assert index.first(Names(["a\n.jar"])) == 1


def test_a_name_longer_than_any_path_matches_nothing() -> None:
    index = PatternIndex(["*", "a" * (LONGEST_NAME + 1)])
    assert index.first(Names(["a" * LONGEST_NAME])) == 0
    assert index.first(Names(["a" * (LONGEST_NAME + 1)])) is None


def test_only_few_of_many_patterns_are_tried_on_a_name() -> None:
    index = PatternIndex([f"*/tool-{n:04}-*.jar" for n in range(1000)])
    tried = index._candidates(Names(["external/tools/tool-0123-deploy.jar"]))
    assert 123 in tried
    assert len(tried) <= 20


@pytest.mark.parametrize("pattern", ["*", "**", "?", "?*?", "[a-z]", "[!x]*", "[]]"])
def test_a_pattern_of_wildcards_alone_names_nothing(pattern: str) -> None:
    assert not names_something(pattern)


@pytest.mark.parametrize("pattern", ["a", "*a", "[x]y", "[", "*[", "a*", "]"])
def test_a_pattern_with_text_of_its_own_names_something(pattern: str) -> None:
    assert names_something(pattern)
