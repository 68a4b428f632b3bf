"""Collection: texts become batches, batches go through a traced model, and its routing becomes shards."""
