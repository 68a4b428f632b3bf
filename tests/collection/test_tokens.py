"""Token strings: what each token adds to the text, for byte-level and for SentencePiece-like tokenizers."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collection.tokens import TokenText
from moe.load import load_tokenizer


def test_byte_level_tokens_join_to_the_text_and_are_never_none(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    text = TokenText(tokenizer)
    ids = tokenizer(" river naïve stone")["input_ids"]
    assert "".join(text.strings(ids)) == "<s> river naïve stone"
    assert all(isinstance(each, str) for each in text.strings(range(len(tokenizer))))


def test_tokens_of_mixtrals_kind_of_tokenizer_keep_their_leading_space() -> None:
    vocabulary = ["<unk>", "<s>", "<0x0A>", "▁", "a", "▁a", "▁the", "b", "<0xE2>"]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    expected = ["<unk>", "<s>", "\n", " ", "a", " a", " the", "b", "�"]
    assert TokenText(tokenizer).strings(range(len(vocabulary))) == expected
