"""Statistics, figures and the self-contained HTML report, from trace shards, predictors and evaluation results."""
