"""Guards: calls of third-party tiers, checked, so that a faulty class costs hits and not blocks."""
