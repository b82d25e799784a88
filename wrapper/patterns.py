"""Many shell patterns, compiled so that the first that matches is found at about the same cost as one.

Owns the search only; knows nothing of what the names are. Patterns are those of the shell (`*`, `?`,
`[abc]`; case matters), matched as `fnmatch.fnmatchcase` does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import translate

LONGEST_NAME = 4096
"""A longer name matches no pattern: no file has one (PATH_MAX), and looking through it would take long."""

_PIECE = 4
_WILDCARD = re.compile(r"\*|\?|\[!?\]?[^\]]*\]")


class Names:
    """Names that are searched for together, and the pieces that they are made of."""

    __slots__ = ("_pieces", "names", "text")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name for name in names if len(name) <= LONGEST_NAME]
        parts: list[str] = []
        for name in self.names:
            if not (parts and parts[-1].endswith(name)):  # a base name is part of the path before it
                parts.append(name)
        self.text = "\0".join(parts)
        self._pieces: dict[int, set[str]] = {}

    def pieces(self, length: int) -> set[str]:
        """All strings of this length in the names."""
        found = self._pieces.get(length)
        if found is None:
            text = self.text
            found = {text[at : at + length] for at in range(len(text) - length + 1)}
            self._pieces[length] = found
        return found


class PatternIndex:
    """An ordered list of patterns. `first(names)`: the place of the first one that matches any of them.

    A pattern without wildcards is found by the name itself. Any other is tried only on names that contain a
    piece of its text, of at most four characters: of all such pieces of it the one that fewest others have.
    """

    __slots__ = ("_by_piece", "_exact", "_expressions", "_lengths", "_unindexed", "patterns")

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact: dict[str, int] = {}
        self._expressions: dict[int, re.Pattern[str]] = {}
        self._by_piece: dict[str, list[int]] = {}
        self._unindexed: list[int] = []
        """Of patterns without any text, such as `*`."""
        pieces_of: dict[int, set[str]] = {}
        for place, pattern in enumerate(self.patterns):
            if not set(pattern) & set("*?["):
                self._exact.setdefault(pattern, place)
                continue
            self._expressions[place] = re.compile(translate(pattern))
            pieces = _pieces_of(pattern)
            if pieces:
                pieces_of[place] = pieces
            else:
                self._unindexed.append(place)
        commonness = Counter(piece for pieces in pieces_of.values() for piece in pieces)
        for place, pieces in pieces_of.items():
            rarest = min(pieces, key=lambda piece: (commonness[piece], piece))
            self._by_piece.setdefault(rarest, []).append(place)
        self._lengths = sorted({len(piece) for piece in self._by_piece})

    def first(self, names: Names) -> int | None:
        """The place of the first pattern that matches one of the names; None: none does."""
        exact = [self._exact[name] for name in names.names if name in self._exact]
        best = min(exact, default=None)
        for place in sorted(self._candidates(names)):
            if best is not None and place > best:
                break
            match = self._expressions[place].match
            if any(match(name) for name in names.names):
                return place
        return best

    def _candidates(self, names: Names) -> set[int]:
        candidates = set(self._unindexed)
        by_piece = self._by_piece
        if len(by_piece) * 4 < len(names.text):
            text = names.text
            found = [piece for piece in by_piece if piece in text]
        else:
            found = [piece for length in self._lengths for piece in names.pieces(length) & by_piece.keys()]
        for piece in found:
            candidates.update(by_piece[piece])
        return candidates


def names_something(pattern: str) -> bool:
    """Whether a pattern has any text of its own: `*` and `?[a-z]*` have none, and so name nothing."""
    return any(_WILDCARD.split(pattern))


def _pieces_of(pattern: str) -> set[str]:
    """All pieces of the greatest length, up to four characters, that the text of a pattern has."""
    literals = _WILDCARD.split(pattern)
    length = min(_PIECE, max(map(len, literals)))
    return {
        literal[at : at + length] for literal in literals for at in range(len(literal) - length + 1) if length
    }
