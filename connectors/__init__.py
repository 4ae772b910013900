"""Engines on the other side: where their KV pages lie, how pages are copied, and their hooks."""

if __name__ == "connectors":
    raise ImportError("import kvcache.connectors, not connectors (you are in the source checkout)")
