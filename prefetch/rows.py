"""The rows of the answer: what one prefetcher with one policy reaches, with intervals over sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefetch.kernel import COUNTERS
from prefetch.simulation import Outcome
from speculation.bootstrap import Floats, interval, resampled_means

SPENT = ("attention_ns", "experts_ns", "other_ns", "waiting_ns")


@dataclass(frozen=True)
class Row:
    """One simulated run, and the resamples of its counters per token, (R, C), in the order of `kernel.COUNTERS`."""

    prefetcher: str
    policy: str
    outcome: Outcome
    resamples_RC: Floats

    @classmethod
    def of(cls, prefetcher: str, policy: str, outcome: Outcome, resamples: int, seed: int) -> Row:
        """Draw the resamples; equal seeds draw the same sequences, so that rows can be paired."""
        tokens_S = outcome.shares_SC[:, COUNTERS.index("tokens")]
        return cls(prefetcher, policy, outcome, resampled_means(outcome.shares_SC, tokens_S, resamples, seed))

    @property
    def tokens_per_s(self) -> float:
        return self.outcome.tokens_per_s

    def faster_than(self, other: Row) -> dict[str, float]:
        """Return how many times as many tokens a second this row makes as the other, with the paired interval."""
        return interval(self.tokens_per_s / other.tokens_per_s, self._tokens_per_s() / other._tokens_per_s())

    def figures(self) -> dict[str, Any]:
        """Return the row's figures with 95 % intervals, and the exact totals behind them."""
        moved = self.outcome.expert_bytes
        return {
            "prefetcher": self.prefetcher,
            "policy": self.policy,
            "tokens_per_s": interval(self.tokens_per_s, self._tokens_per_s()),
            "waiting_ms_per_token": self._figure(lambda of: of("waiting_ns") / of("tokens") / 1e6),
            "hit_rate": self._figure(lambda of: of("hits") / of("lookups")),
            "useful_share": self._share("useful"),
            "late_share": self._share("late"),
            "bytes_per_token": self._figure(lambda of: (of("demanded") + of("prefetched")) / of("tokens") * moved),
            "totals": {**self.outcome.totals, "unused": self.outcome.unused, "expert_bytes": moved},
        }

    def _share(self, counter: str) -> dict[str, float] | None:
        """Return a counter's part of the prefetches; None where there were none."""
        if not self.outcome.totals["prefetched"]:
            return None
        return self._figure(lambda of: of(counter) / np.maximum(of("prefetched"), 1e-12))

    def _figure(self, formula: Callable[[Callable[[str], Any]], Any]) -> dict[str, float]:
        value = float(formula(lambda name: self.outcome.totals[name]))
        return interval(value, formula(lambda name: self.resamples_RC[:, COUNTERS.index(name)]))

    def _tokens_per_s(self) -> Floats:
        """Return the resamples of tokens per second; those of a run that takes no time are infinite."""
        spent_R = sum(self.resamples_RC[:, COUNTERS.index(name)] for name in SPENT)
        with np.errstate(divide="ignore"):
            return np.asarray(1e9 / spent_R)


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table as text for a terminal, a line between prefetchers."""
    header = ["prefetcher", "policy", "tokens/s [95 %]", "waiting ms/token", "hit rate", "useful", "late", "MB/token",
              "times as fast"]  # fmt: skip
    lines = [header]
    for row in rows:
        useful, late, gain = row["useful_share"], row["late_share"], row["over_caching"]
        speed = row["tokens_per_s"]
        lines.append(
            [
                row["prefetcher"],
                row["policy"],
                f"{speed['value']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]",
                f"{row['waiting_ms_per_token']['value']:.2f}",
                f"{row['hit_rate']['value']:.3f}",
                "" if useful is None else f"{useful['value']:.2f}",
                "" if late is None else f"{late['value']:.2f}",
                f"{row['bytes_per_token']['value'] / 1e6:.1f}",
                f"{gain['value']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    shown = [texts[0], "  ".join("-" * width for width in widths)]
    for before, line, text in zip(lines, lines[1:], texts[1:], strict=False):
        if before[0] not in ("prefetcher", line[0]):
            shown.append("")
        shown.append(text)
    return "\n".join(shown)
