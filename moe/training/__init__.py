"""Training of the models that we trace: the mini-Mixtral's language-model training."""
