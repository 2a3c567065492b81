"""Prints how much has been tokenised, while the work goes on."""

from __future__ import annotations

import sys
import time


class Counter:
    """Prints the numbers of documents (or other ``units``) and tokens so far to stderr.

    On a terminal this is one live line. With ``interval`` it is a line every ``interval`` documents instead.
    Unless an error ends the work, a line with the totals follows at the end.

    Args:
        what: the name of the source, for the lines.
    """

    def __init__(self, what: str, interval: int | None = None, units: str = "documents"):
        self.what, self.live, self.seen = what, sys.stderr.isatty() and interval is None, (0, 0)
        self.units = units
        self.interval, self.shown, self.begun = interval, 0, time.monotonic()
        self.last = 0.0

    def __call__(self, documents: int, tokens: int) -> None:
        self.seen = documents, tokens
        if self.live and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            print(
                f"\rtokenising {self.what}: {documents:,} {self.units}, {tokens:,} tokens",
                end="",
                file=sys.stderr,
            )
        if self.interval and documents // self.interval > self.shown:
            self.shown = documents // self.interval
            rate = documents / max(time.monotonic() - self.begun, 1e-9)
            print(
                f"processed {documents:,} {self.units}, {tokens:,} tokens ({rate:,.0f} {self.units}/s)",
                file=sys.stderr,
            )

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, kind=None, *_) -> None:
        if kind is None and self.seen[0]:
            start = "\r" if self.live else ""
            print(
                f"{start}tokenised {self.what}: {self.seen[0]:,} {self.units}, {self.seen[1]:,} tokens",
                file=sys.stderr,
            )
