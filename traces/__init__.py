"""The routing-trace format: schema, plan, manifest, shard writer, reader, verification and imports.

Knows nothing of models, of training or of plots. One row of a shard is one token; a sequence is never cut across shards
or row groups, so every reader gets whole sequences.
"""
