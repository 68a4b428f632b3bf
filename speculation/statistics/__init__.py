"""The statistics-aware predictor: counts of one pass, and what the sequence so far says."""

from speculation.statistics.predictor import Statistics

__all__ = ["Statistics"]
