"""Statistics of the routing, one per file, each counted in one streaming pass with bounded memory."""
