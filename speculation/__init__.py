"""Guessing which experts a mixture-of-experts model needs next: predictors, their training, and honest evaluation.

Uses traces; knows nothing of the traced models. Importing it registers every predictor.
"""

from speculation import counted, ensemble, foresight, interlayer, lookahead, peers, statistics
from speculation.evaluation import evaluate, format_table
from speculation.features import RoutingBatch
from speculation.predictor import PREDICTORS, Predictor, RoutingShape, create, load_predictor, load_predictors, register

__all__ = [
    "PREDICTORS",
    "Predictor",
    "RoutingBatch",
    "RoutingShape",
    "counted",
    "create",
    "ensemble",
    "evaluate",
    "foresight",
    "format_table",
    "interlayer",
    "load_predictor",
    "load_predictors",
    "lookahead",
    "peers",
    "register",
    "statistics",
]
