"""Parts that the networks of several predictors are built from."""
