"""Lower tiers: those below L1, which are asked with a deadline and written to behind the engine."""
