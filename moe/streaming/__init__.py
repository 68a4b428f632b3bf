"""Running a model one layer at a time, each layer's weights read from the checkpoint while the one before computes."""
