"""Tools that make shards: ingest and its checks."""
