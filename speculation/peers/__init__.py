"""Published ideas, re-implemented from their descriptions, so that every comparison runs on the same traces and splits.

Each file says which paper, which published figure it mirrors, how ours differs and why comparing with it is fair.
`gate_lookahead` (mixtral-offloading, DAOP, Fate) is older here and lives in speculation.lookahead.
"""

from speculation.peers import activation_lookup, edge_table, rank_path, token_transformer

__all__ = ["activation_lookup", "edge_table", "rank_path", "token_transformer"]
