"""Lower tiers: promotion to L1 and write-behind, and direct tiers for engines without an L1."""
