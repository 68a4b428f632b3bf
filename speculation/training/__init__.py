"""Training: from a trace folder to a predictor folder, within a memory budget, on one process or several."""
