"""Which experts serve which classes of tokens: kind of text, place in a word, place in the sequence.

A class is compared with all tokens of the same sequence, so that what differs between texts does not count. Per
sequence s, x_s is how often the expert was chosen for the class's tokens less what the sequence's own mean would give
for as many tokens. The difference shown is the sum of x_s over the number of those selections, and the test is
Student's t of the x_s against 0 with sequences as the unit: permuting classes among tokens would take neighbours for
independent and find everything significant. The variance is at least that of as many tokens drawn at random from the
sequence: where a class has few tokens and an expert few uses, it may be that no sequence shows a use, and x_s that
hardly differ would look certain. The q-values are Benjamini and Hochberg's over all classes, layers and experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import stats

from analysis.counts.chunks import Chunk, Chunked
from analysis.counts.significance import benjamini_hochberg
from analysis.counts.token_kinds import KINDS, token_text
from analysis.counts.usage import count_experts
from analysis.tokens import token_texts

PIECES = ("word starts", "word pieces")
POSITIONS = ("first token", "tokens 2 to 16", "later tokens")
CLASSES = (*KINDS, *PIECES, *POSITIONS)
EARLY_TOKENS = 16
MIN_SEQUENCES = 10  # with the class and other tokens; with fewer there is no test
EXAMPLES = 8  # token texts kept per kind, layer and expert
SAMPLED_TOKENS = 512  # of a chunk, from which examples are drawn


@dataclass(frozen=True, eq=False)
class ClassDifferences:
    """Share of a class's selections that each expert has, less the mean of the same texts; only of tested classes."""

    classes: list[str]  # C of them
    tokens_C: NDArray[np.int64]
    sequences_C: NDArray[np.int64]  # that hold tokens of the class and others
    share_CLE: NDArray[np.float64]
    difference_CLE: NDArray[np.float64]
    p_CLE: NDArray[np.float64]  # two-sided
    q_CLE: NDArray[np.float64]


class TokenClassCounts(Chunked):
    """Per class, layer and expert: selections, and sum and sum of squares over sequences of the excess x_s."""

    def __init__(self, num_layers: int, num_experts: int, *, seed: int = 0) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        size = num_layers * num_experts
        self._counts_CN = np.zeros((len(CLASSES), size))
        self._excess_CN = np.zeros((len(CLASSES), size))
        self._squares_CN = np.zeros((len(CLASSES), size))
        self._chance_CN = np.zeros((len(CLASSES), size))  # variance of the excess if tokens were independent
        self._tokens_C = np.zeros(len(CLASSES), dtype=np.int64)
        self._sequences_C = np.zeros(len(CLASSES), dtype=np.int64)
        self._top_k = 1
        self.texts_known = False
        self._rng = np.random.default_rng(seed)
        self._example_ids = np.full((len(KINDS), size, EXAMPLES), -1, dtype=np.int32)
        self._example_ranks = np.zeros((len(KINDS), size, EXAMPLES), dtype=np.float32)
        self._texts: dict[str, int] = {}

    def differences(self) -> ClassDifferences:
        """Return the differences of all classes that enough sequences hold."""
        self.flush()
        kept = np.flatnonzero(self._sequences_C >= MIN_SEQUENCES)
        shape = (len(kept), self.num_layers, self.num_experts)
        number_C1 = self._sequences_C[kept, None].astype(np.float64)
        selections_C1 = self._tokens_C[kept, None] * self._top_k
        excess_CN, squares_CN = self._excess_CN[kept], self._squares_CN[kept]
        variance_CN = np.maximum(squares_CN - excess_CN**2 / number_C1, 0.0) * number_C1 / (number_C1 - 1)
        variance_CN = np.maximum(variance_CN, self._chance_CN[kept])
        moved = variance_CN > 1e-12
        t_CN = np.divide(excess_CN, np.sqrt(variance_CN), out=np.zeros_like(excess_CN), where=moved)
        p_CN = np.where(moved, 2 * stats.t.sf(np.abs(t_CN), number_C1 - 1), 1.0)
        return ClassDifferences(
            classes=[CLASSES[place] for place in kept],
            tokens_C=self._tokens_C[kept],
            sequences_C=self._sequences_C[kept],
            share_CLE=(self._counts_CN[kept] / selections_C1).reshape(shape),
            difference_CLE=(excess_CN / selections_C1).reshape(shape),
            p_CLE=p_CN.reshape(shape),
            q_CLE=benjamini_hochberg(p_CN).reshape(shape),
        )

    def examples(self, name: str, layer: int, expert: int) -> list[str]:
        """Return texts of some tokens of a kind that chose the expert, drawn at random, each text once.

        Empty for classes that are no kind of text.
        """
        if name not in KINDS:
            return []
        texts = list(self._texts)
        drawn = self._example_ids[KINDS.index(name), layer * self.num_experts + expert]
        return list(dict.fromkeys(texts[each] for each in drawn if each >= 0))

    def _count(self, chunk: Chunk) -> None:
        self._top_k = chunk.ids_LTK.shape[2]
        kinds: list[NDArray[np.int64]] = []
        texts: list[str] = []
        for trace in chunk.traces:
            read = token_texts(trace.tokens_T)
            is_class_CT, kind_T = classify(read, trace.num_tokens)
            kinds.append(kind_T)
            texts += read or [""] * trace.num_tokens
            self._add_sequence(trace.expert_ids_TLK, is_class_CT)
        kind_T = np.concatenate(kinds)
        if (kind_T >= 0).any():
            self.texts_known = True
            self._keep_examples(chunk.ids_LTK, kind_T, texts)

    def _add_sequence(self, ids_TLK: NDArray[np.integer], is_class_CT: NDArray[np.bool_]) -> None:
        counts_CLE = np.zeros((len(CLASSES), self.num_layers, self.num_experts))
        _count_classes(np.ascontiguousarray(ids_TLK), is_class_CT, counts_CLE)
        counts_CN = counts_CLE.reshape(len(CLASSES), -1)
        all_N = count_experts(ids_TLK, self.num_experts).ravel()
        tokens_C = is_class_CT.sum(axis=1)
        self._counts_CN += counts_CN
        self._tokens_C += tokens_C
        tested = np.flatnonzero((tokens_C > 0) & (tokens_C < len(ids_TLK)))
        if not len(tested):
            return
        excess = counts_CN[tested] - tokens_C[tested, None] / len(ids_TLK) * all_N
        self._excess_CN[tested] += excess
        self._squares_CN[tested] += excess**2
        use_N, drawn_C = all_N / len(ids_TLK), tokens_C[tested] / len(ids_TLK)
        scale_C = len(ids_TLK) ** 2 / (len(ids_TLK) - 1) * drawn_C * (1 - drawn_C)  # drawn without replacement
        self._chance_CN[tested] += scale_C[:, None] * (use_N * (1 - use_N))
        self._sequences_C[tested] += 1

    def _keep_examples(self, ids_LTK: NDArray[np.integer], kind_T: NDArray[np.int64], texts: list[str]) -> None:
        """Give a sample of the chunk's tokens random ranks and slots; every slot keeps the token of highest rank."""
        usable = np.flatnonzero(kind_T >= 0)
        drawn = self._rng.permutation(usable)[:SAMPLED_TOKENS]
        ranks = np.sort(self._rng.random(len(drawn), dtype=np.float32))
        numbers = np.array([self._texts.setdefault(texts[token], len(self._texts)) for token in drawn], dtype=np.int32)
        slots = self._rng.integers(0, EXAMPLES, len(drawn))
        ids_TLK = ids_LTK[:, drawn].transpose(1, 0, 2).astype(np.int64)
        place_TLK = np.arange(self.num_layers)[:, None] * self.num_experts + ids_TLK
        flat = ((kind_T[drawn, None, None] * self._example_ids.shape[1] + place_TLK) * EXAMPLES) + slots[:, None, None]
        flat, width = flat.reshape(len(drawn), -1), flat[0].size if len(drawn) else 0
        ids, best = self._example_ids.reshape(-1), self._example_ranks.reshape(-1)
        better = ranks[:, None] > best[flat]
        places, given = flat[better], np.repeat(np.arange(len(drawn)), width).reshape(flat.shape)[better]
        ids[places], best[places] = numbers[given], ranks[given]  # ranks rise, and of equal places the last one stays


def classify(texts: Sequence[str], num_tokens: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which of CLASSES the tokens of one sequence belong to, [C, T], and the kind of each, -1 where unknown.

    A word piece goes on with a word that the token before it left off; a word start begins with a letter otherwise.
    """
    kind_T = np.full(num_tokens, -1, dtype=np.int64)
    starts_T, pieces_T = np.zeros(num_tokens, dtype=bool), np.zeros(num_tokens, dtype=bool)
    in_word = False
    for place, text in enumerate(texts):
        if not text:
            in_word = False
            continue
        known = token_text(text)
        kind_T[place] = known.kind
        if known.begins_in_word:
            goes_on = in_word and not known.spaced
            (pieces_T if goes_on else starts_T)[place] = True
        in_word = known.ends_in_word
    place_T = np.arange(num_tokens)
    early = place_T < EARLY_TOKENS
    return (
        np.concatenate(
            [
                kind_T == np.arange(len(KINDS))[:, None],
                np.stack([starts_T, pieces_T, place_T == 0, early & (place_T > 0), ~early]),
            ]
        ),
        kind_T,
    )


@njit(cache=True, nogil=True)
def _count_classes(ids_TLK: Any, is_class_CT: Any, counts_CLE: Any) -> None:
    tokens, layers, top_k = ids_TLK.shape
    for row in range(len(is_class_CT)):
        for t in range(tokens):
            if is_class_CT[row, t]:
                for layer in range(layers):
                    for k in range(top_k):
                        counts_CLE[row, layer, ids_TLK[t, layer, k]] += 1
