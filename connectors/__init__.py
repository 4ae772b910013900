"""Connectors: the layouts of an engine's KV cache, copies of its pages, and the engines' hooks."""

if __name__ == "connectors":
    raise ImportError("import kvcache.connectors, not connectors (you are in the source checkout)")
