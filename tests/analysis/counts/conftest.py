"""Random routing in memory, without a trace folder around it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from traces.schema import SequenceTrace

WORDS = ("<s>", " the", " cat", "s", " Rome", "12", ".", "\n", " {", " of", " x1", " Москва")

MakeTraces = Callable[..., list[SequenceTrace]]


@pytest.fixture(scope="session")
def make_traces() -> MakeTraces:
    """Returns a function that makes sequences whose routing lingers: scores drift from token to token."""

    def make(
        lengths: Sequence[int],
        *,
        layers: int = 3,
        experts: int = 6,
        top_k: int = 2,
        datasets: Sequence[str] = ("code", "prose"),
        linger: float = 0.7,
        words: Sequence[str] = WORDS,
        seed: int = 0,
    ) -> list[SequenceTrace]:
        rng = np.random.default_rng(seed)
        traces = []
        for number, tokens in enumerate(lengths):
            scores = rng.normal(size=(tokens, layers, experts))
            for token in range(1, tokens):
                scores[token] = linger * scores[token - 1] + np.sqrt(1 - linger**2) * scores[token]
            ids = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.min_scalar_type(experts - 1))
            traces.append(
                SequenceTrace(
                    dataset=datasets[number % len(datasets)],
                    sequence_id=number,
                    sequence_key=str(number),
                    token_ids_T=rng.integers(0, 9, tokens).astype(np.int32),
                    tokens_T=[words[each] for each in rng.integers(0, len(words), tokens)],
                    phase_T=np.zeros(tokens, dtype=np.uint8),
                    expert_ids_TLK=ids,
                )
            )
        return traces

    return make
