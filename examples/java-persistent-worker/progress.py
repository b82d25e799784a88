"""A progress bar on stderr: redrawn in place on a terminal, a line for each quarter elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

BAR_WIDTH = 30


class Progress:
    """Counts steps towards `total` and shows them. Use it as a context manager."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def step(self) -> None:
        before = self._done * 4 // self._total
        self._done += 1
        if self._terminal or self._done * 4 // self._total > before:
            self._show()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._started
        counts = f"{self._done:>4}/{self._total}  {elapsed:6.1f} s  {self._label}"
        if self._terminal:
            filled = BAR_WIDTH * self._done // self._total
            sys.stderr.write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {counts}")
        else:
            sys.stderr.write(f"{counts}\n")
        sys.stderr.flush()
