"""The data sets that `--datasets` knows by name: public sets on the Hugging Face hub, and mixes of names.

Repositories, columns, splits and licences were last compared in 2026, with public copies of the sets' cards and with
other projects' code and lists; the hub's own cards have the last word.
"""

from dataclasses import dataclass

from collection.installed import KINDS


@dataclass(frozen=True)
class HubDataset:
    """Where a public data set is found today, which columns make up its text, and its licence as its card states it."""

    repository: str
    text_fields: tuple[str, ...]
    licence: str
    config: str | None = None
    split: str = "train"


DEFAULT: dict[str, HubDataset] = {
    "imdb": HubDataset("stanfordnlp/imdb", ("text",), "other"),
    "yelp_review_full": HubDataset("Yelp/yelp_review_full", ("text",), "other (yelp-licence)"),
    "ag_news": HubDataset("fancyzhx/ag_news", ("text",), "unknown"),
    "squad": HubDataset("rajpurkar/squad", ("context",), "cc-by-sa-4.0"),
    "amazon_polarity": HubDataset("fancyzhx/amazon_polarity", ("content",), "apache-2.0"),
    "dbpedia_14": HubDataset("fancyzhx/dbpedia_14", ("content",), "cc-by-sa-3.0"),
    "yahoo_answers_topics": HubDataset("community-datasets/yahoo_answers_topics", ("best_answer",), "unknown"),
    "wikitext-2-raw-v1": HubDataset("Salesforce/wikitext", ("text",), "cc-by-sa-3.0, gfdl", "wikitext-2-raw-v1"),
}

REASONING: dict[str, HubDataset] = {
    "gsm8k": HubDataset("openai/gsm8k", ("question", "answer"), "mit", "main"),
    "aqua_rat": HubDataset("deepmind/aqua_rat", ("question", "rationale"), "apache-2.0", "raw"),
    "numina_math_cot": HubDataset("AI-MO/NuminaMath-CoT", ("problem", "solution"), "apache-2.0"),
}

CODE: dict[str, HubDataset] = {
    "code_to_text_python": HubDataset("google/code_x_glue_ct_code_to_text", ("code",), "c-uda", "python"),
    "magicoder_oss_instruct": HubDataset("ise-uiuc/Magicoder-OSS-Instruct-75K", ("problem", "solution"), "mit"),
    "self_oss_instruct": HubDataset(
        "bigcode/self-oss-instruct-sc2-exec-filter-50k", ("instruction", "response"), "odc-by"
    ),
}

DIALOGUE: dict[str, HubDataset] = {
    "ultrachat_200k": HubDataset("HuggingFaceH4/ultrachat_200k", ("messages",), "mit", split="train_sft"),
    "soda": HubDataset("allenai/soda", ("dialogue",), "cc-by-4.0"),
    "dolly_15k": HubDataset("databricks/databricks-dolly-15k", ("instruction", "context", "response"), "cc-by-sa-3.0"),
}

HUB = DEFAULT | REASONING | CODE | DIALOGUE

MIXES: dict[str, tuple[str, ...]] = {
    "installed": tuple(KINDS),
    "default": tuple(DEFAULT),
    "reasoning": tuple(REASONING),
    "code": tuple(CODE),
    "dialogue": tuple(DIALOGUE),
}
"""A mix stands for its members, in this order."""


def known_names() -> str:
    """Return every registered name, for messages."""
    return f"mixes {', '.join(MIXES)}; installed text {', '.join(KINDS)}; from the hub {', '.join(HUB)}"
