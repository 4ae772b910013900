"""Guards around third-party tiers: a faulty class costs cache hits, never wrong blocks."""
