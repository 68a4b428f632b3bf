"""The traced models: finding their routers, loading them at a stated precision, and running them on batches of text.

This package knows nothing of trace files; `collection` joins the two.
"""
