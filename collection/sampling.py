"""Which texts of a source are traced: a seeded uniform order without replacement, of which the first usable ones count.

Every row draws a random priority, and rows are taken by rising priority. Only the lowest few are kept while a source
streams by, so a data set of millions of rows needs the memory of some thousands; the order is the same however many
are kept. Texts are tokenised as far as they are needed. Skipped, and counted by reason: rows without text, texts
shorter than `min_tokens`, and sequences equal to one already taken, from whichever source.
"""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collection.settings import CollectSettings
from collection.sources import Row, Source
from groundwork.progress import progress

CANDIDATES_PER_SEQUENCE = 4  # rows kept at first for each sequence wanted
LEAST_CANDIDATES = 1024
CHARACTERS_PER_TOKEN = 64
"""Text beyond `max_length` times this many characters is not tokenised: real text has 2 to 6 characters a token."""


class Sequence(NamedTuple):
    """One text chosen to be traced."""

    dataset: str
    key: str
    row: int
    token_ids_T: NDArray[np.int32]


@dataclass
class Draw:
    """What a source gave: its sequences in drawn order, and what was skipped on the way to them."""

    source: Source
    requested: int
    rows: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def facts(self) -> dict[str, Any]:
        """Return the plan's record of this source: where it is, rows in it, sequences asked for and had, skips."""
        return self.source.facts | {
            "rows": self.rows,
            "requested": self.requested,
            "available": len(self.sequences),
            "skipped": dict(sorted(self.skipped.items())),
        }


def draw(sources: list[Source], tokenizer: Any, settings: CollectSettings) -> list[Draw]:
    """Draw from every source its share of `target_traces`."""
    taken: set[bytes] = set()
    wanted = shares(settings.target_traces, [source.weight for source in sources])
    return [
        _draw_source(source, count, tokenizer, settings, taken) for source, count in zip(sources, wanted, strict=True)
    ]


def shares(total: int, weights: list[Fraction]) -> list[int]:
    """Split `total` in proportion to positive weights: by largest remainder, of equal ones the first.

    Each share is less than 1 away from the exact one, and equal weights have shares that differ by at most 1.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    result = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: result[index] - exact[index])
    for index in by_remainder[: total - sum(result)]:
        result[index] += 1
    return result


def first_rows(source: Source, seed: int, count: int) -> tuple[list[Row], int]:
    """Return the first `count` rows of the source's random order, and how many rows the source has."""
    name = hashlib.blake2b(source.name.encode(), digest_size=8).digest()
    generator = np.random.default_rng([seed, int.from_bytes(name, "big")])
    kept: list[tuple[float, int, Row]] = []  # a heap with the highest priority on top
    rows, priorities = 0, generator.random(0)
    for row in progress(source.read(), description=f"reading {source.name}", unit="text"):
        if rows % 4096 == 0:
            priorities = generator.random(4096)
        entry = (-float(priorities[rows % 4096]), -row.number, row)
        rows += 1
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    return [row for _, _, row in sorted(kept, reverse=True)], rows


def _draw_source(source: Source, wanted: int, tokenizer: Any, settings: CollectSettings, taken: set[bytes]) -> Draw:
    result = Draw(source, wanted)
    if wanted == 0:
        return result
    kept, done = max(CANDIDATES_PER_SEQUENCE * wanted, LEAST_CANDIDATES), 0
    while True:
        rows, result.rows = first_rows(source, settings.seed, kept)
        while done < len(rows) and len(result.sequences) < wanted:
            missing = wanted - len(result.sequences)
            block = rows[done : done + max(missing + missing // 4, 16)]
            done += _take(block, result, tokenizer, settings, taken)
        if len(result.sequences) == wanted or result.rows <= kept:
            return result
        kept *= 8  # too many were unusable: read again and keep more of the same order


def _take(rows: list[Row], result: Draw, tokenizer: Any, settings: CollectSettings, taken: set[bytes]) -> int:
    """Add the usable ones of `rows`, until there are enough; returns how many rows were looked at."""
    limit = settings.max_length * CHARACTERS_PER_TOKEN
    texts = [row.text[:limit] for row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=settings.max_length, return_attention_mask=False)
    for looked_at, (row, text, ids) in enumerate(zip(rows, texts, encoded["input_ids"], strict=True)):
        if len(result.sequences) == result.requested:
            return looked_at
        token_ids = np.array(ids, dtype=np.int32)
        digest = hashlib.blake2b(token_ids.tobytes(), digest_size=16).digest()
        if not text.strip():
            result.skipped["no text"] += 1
        elif len(token_ids) < settings.min_tokens:
            result.skipped[f"shorter than {settings.min_tokens} tokens"] += 1
        elif digest in taken:
            result.skipped["duplicate"] += 1
        else:
            taken.add(digest)
            result.sequences.append(Sequence(result.source.name, row.key, row.number, token_ids))
    return len(rows)
