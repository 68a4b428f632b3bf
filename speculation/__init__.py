"""Guessing which experts a mixture-of-experts model needs next: predictors, their training, and honest evaluation.

Uses traces; knows nothing of the traced models. Importing it registers every predictor.
"""

from speculation import counted, interlayer, lookahead
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
    "evaluate",
    "format_table",
    "interlayer",
    "load_predictor",
    "load_predictors",
    "lookahead",
    "register",
]
