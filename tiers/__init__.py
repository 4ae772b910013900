"""The shipped tiers, one per file or folder. They import `kvcache` and never each other."""

if __name__ == "tiers":
    raise ImportError("import kvcache.tiers, not tiers (you are in the source checkout)")
