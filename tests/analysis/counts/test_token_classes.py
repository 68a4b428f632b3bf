"""Kinds of tokens by example; differences against a slow computation; the test keeps its promise where nothing is."""

import numpy as np
import pytest
from scipy import stats

from analysis.counts import chunks, token_classes
from analysis.counts.token_classes import CLASSES, TokenClassCounts, classify
from analysis.counts.token_kinds import KINDS, token_text
from traces.schema import SequenceTrace


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<s>", "control tokens"), ("<|channel|>", "control tokens"), ("<｜begin▁of▁sentence｜>", "control tokens"),
        ("[PAD]", "control tokens"), (" ", "white space"), ("\n  ", "white space"), (" 12", "digits"), ("½", "digits"),
        (".", "punctuation"), (' "', "punctuation"), ("…", "punctuation"), ("{", "code symbols"),
        (" ==", "code symbols"), (").", "punctuation"), ("`,", "code symbols"),
        (" the", "function words"), ("The", "function words"),
        (" cat", "lower-case words"), (" Rome", "capitalised words"), ("HTTP", "capitalised words"),
        (" don't", "lower-case words"), ("café", "lower-case words"), (" Москва", "non-Latin text"),
        ("中", "non-Latin text"), ("x1", "other text"), ("foo_bar", "other text"), ("\ufffd", "code symbols"),
        ("\u202e", "other text"), ("\x00", "other text"),
    ],
)  # fmt: skip
def test_a_token_is_of_the_kind_a_reader_would_say(text: str, kind: str) -> None:
    assert KINDS[token_text(text).kind] == kind


def test_pieces_go_on_with_a_word_and_places_count_from_the_first_token() -> None:
    texts = ["Re", "port", "ing", " of", " New", "York", ".", "com", "", "pound"]
    is_class, kind = classify(texts, len(texts))
    found = {name: np.flatnonzero(is_class[CLASSES.index(name)]).tolist() for name in CLASSES}
    assert found["word starts"] == [0, 3, 4, 7, 9]
    assert found["word pieces"] == [1, 2, 5]
    assert found["first token"] == [0]
    assert found["tokens 2 to 16"] == list(range(1, 10))
    assert kind[8] == -1
    is_class, kind = classify([], 20)
    assert (kind == -1).all()
    assert is_class[CLASSES.index("later tokens")].sum() == 4


def counted(traces: list[SequenceTrace], layers: int = 3, experts: int = 6) -> TokenClassCounts:
    counts = TokenClassCounts(layers, experts)
    for trace in traces:
        counts.add(trace)
    return counts


def test_differences_and_tests_equal_a_slow_computation(make_traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 100)
    traces = make_traces([1, 1, *range(5, 45)])
    found = counted(traces).differences()
    assert "digits" in found.classes
    for c, name in enumerate(found.classes):
        for layer, expert in ((0, 1), (2, 5)):
            excess, chosen, tokens, drawn_at_random = [], 0, 0, 0.0
            for trace in traces:
                member = classify(trace.tokens_T, trace.num_tokens)[0][CLASSES.index(name)]
                uses = (trace.expert_ids_TLK[:, layer] == expert).any(axis=-1)
                chosen += int(uses[member].sum())
                tokens += int(member.sum())
                if 0 < member.sum() < len(member):
                    excess.append(uses[member].sum() - member.sum() * uses.mean())
                    left = (len(member) - member.sum()) / (len(member) - 1)  # without replacement
                    drawn_at_random += member.sum() * uses.mean() * (1 - uses.mean()) * left
            assert (found.tokens_C[c], found.sequences_C[c]) == (tokens, len(excess))
            assert found.share_CLE[c, layer, expert] == pytest.approx(chosen / (2 * tokens))
            assert found.difference_CLE[c, layer, expert] == pytest.approx(sum(excess) / (2 * tokens), abs=1e-12)
            variance = max(len(excess) * np.var(excess, ddof=1), drawn_at_random)
            if variance > 1e-9:
                t = abs(sum(excess)) / np.sqrt(variance)
                assert found.p_CLE[c, layer, expert] == pytest.approx(2 * stats.t.sf(t, len(excess) - 1))


def test_a_class_that_is_sent_elsewhere_is_found_and_nothing_else(make_traces) -> None:
    traces = make_traces([60] * 40)
    for trace in traces:
        for place, text in enumerate(trace.tokens_T):
            if text == "12":
                trace.expert_ids_TLK[place, 1] = (4, 2)
    found = counted(traces).differences()
    digits = found.classes.index("digits")
    assert found.q_CLE[digits, 1, 4] < 1e-6
    assert found.difference_CLE[digits, 1, 4] > 0.2
    assert found.q_CLE[digits, 1, 0] < 0.05  # pushed out
    assert found.q_CLE[:, (0, 2)].min() > 0.01


def test_without_an_effect_p_values_are_as_small_as_often_as_they_say(make_traces) -> None:
    """Texts differ from each other and routing lingers, so that tokens are far from independent."""
    p = []
    for seed in range(8):
        traces = make_traces([30] * 60, linger=0.9, seed=seed)
        kinds = counted(traces).differences()
        p.append(kinds.p_CLE[[kinds.classes.index(name) for name in ("digits", "punctuation", "lower-case words")]])
    p_values = np.array(p)
    for alpha in (0.05, 0.2, 0.5):
        assert (p_values <= alpha).mean() == pytest.approx(alpha, rel=0.35)


def test_an_expert_that_no_single_token_of_a_class_happened_to_choose_is_not_called_avoided(make_traces) -> None:
    """One token of each of 25 texts, of experts that one token in thirty uses: none is expected to choose some."""
    traces = make_traces([60] * 25, experts=60)
    first = counted(traces, experts=60).differences()
    place = first.classes.index("first token")
    unused = first.share_CLE[place] == 0
    assert unused.mean() > 0.3
    assert first.p_CLE[place][unused].min() > 0.05


def test_classes_of_few_sequences_and_tokens_without_text_are_not_tested(make_traces) -> None:
    assert counted(make_traces([20] * 9)).differences().classes == []
    counts = counted(make_traces([30] * 12, words=("",)))
    assert counts.differences().classes == ["first token", "tokens 2 to 16", "later tokens"]
    assert not counts.texts_known
    assert counts.examples("digits", 0, 0) == []


def test_examples_are_tokens_of_the_class_that_chose_the_expert(make_traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(token_classes, "SAMPLED_TOKENS", 60)
    traces = make_traces([40] * 10, words=("1", "22", "333", " a", "."))
    counts = counted(traces)
    counts.flush()
    chose: dict[tuple[int, int], set[str]] = {}
    for trace in traces:
        for place, text in enumerate(trace.tokens_T):
            for layer in range(3):
                for expert in trace.expert_ids_TLK[place, layer].tolist():
                    chose.setdefault((layer, expert), set()).add(text)
    for (layer, expert), texts in chose.items():
        examples = counts.examples("digits", layer, expert)
        assert examples
        assert set(examples) <= texts & {"1", "22", "333"}
        assert len(set(examples)) == len(examples)
    assert counts.examples("word starts", 0, 0) == []
