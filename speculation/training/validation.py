"""How well the weights do on validation_stop, by which training keeps the best and ends; and when that is found out."""

from __future__ import annotations

from collections.abc import Collection

from speculation.features import packed_batches
from speculation.metrics import token_values
from speculation.neural import NeuralPredictor
from speculation.training.distributed import Group
from speculation.training.view import TrainingView

SPLIT = "validation_stop"
BATCH = 4096  # tokens
EPOCHS = 0.5  # between two validations
COST = 5  # tokens scored are at most this part of those trained meanwhile; scoring costs a third of a step


def validation_recall(
    predictor: NeuralPredictor, dataset: TrainingView, columns: Collection[str], group: Group
) -> float | None:
    """Recall at K one layer ahead, layers with one below; None where no sequence is in the split.

    Each process scores its part, and all return the whole's.
    """
    metric = f"recall@{dataset.spec.top_k}"
    above = slice(1 if dataset.spec.num_layers > 1 else 0, None)
    found = wanted = 0.0
    stream = dataset.sequences(SPLIT, columns, worker=(group.rank, group.size))
    for _, batch in packed_batches(stream, dataset.spec, BATCH):
        recall_TL = token_values(predictor.predict_scores(batch), batch, [metric])[:, above, 0]
        found += float(recall_TL.sum())
        wanted += recall_TL.numel()
    found, wanted = group.sum_numbers((found, wanted), predictor.device)
    return found / wanted if wanted else None


def tokens_between(dataset: TrainingView, epoch_tokens: int) -> float:
    """Tokens trained from one validation to the next."""
    scored = sum(int(dataset.index.num_tokens_S[window].sum()) for window in dataset.order(SPLIT))
    return max(EPOCHS * epoch_tokens, COST * scored)
