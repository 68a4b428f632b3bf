"""The data sets that `--datasets` knows by name: public sets on the Hugging Face hub, and mixes of names."""

from dataclasses import dataclass

from collection.installed import KINDS


@dataclass(frozen=True)
class HubDataset:
    """Where a public data set is found today, which column is its text, and its licence as its card states it."""

    repository: str
    text_field: str
    licence: str
    config: str | None = None
    split: str = "train"


HUB: dict[str, HubDataset] = {
    "imdb": HubDataset("stanfordnlp/imdb", "text", "other"),
    "yelp_review_full": HubDataset("Yelp/yelp_review_full", "text", "other (yelp-licence)"),
    "ag_news": HubDataset("fancyzhx/ag_news", "text", "unknown"),
    "squad": HubDataset("rajpurkar/squad", "context", "cc-by-sa-4.0"),
    "amazon_polarity": HubDataset("fancyzhx/amazon_polarity", "content", "apache-2.0"),
    "dbpedia_14": HubDataset("fancyzhx/dbpedia_14", "content", "cc-by-sa-3.0"),
    "yahoo_answers_topics": HubDataset("community-datasets/yahoo_answers_topics", "best_answer", "unknown"),
    "wikitext-2-raw-v1": HubDataset("Salesforce/wikitext", "text", "cc-by-sa-3.0, gfdl", config="wikitext-2-raw-v1"),
}
"""Checked against the cards stored in the `datasets` library's history; the hub's own cards have the last word."""

MIXES: dict[str, tuple[str, ...]] = {"installed": tuple(KINDS), "default": tuple(HUB)}
"""A mix stands for its members, in this order."""


def known_names() -> str:
    """Return every registered name, for messages."""
    return f"mixes {', '.join(MIXES)}; installed text {', '.join(KINDS)}; from the hub {', '.join(HUB)}"
