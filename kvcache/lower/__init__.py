"""Lower tiers: promotion to L1 and write-behind from it, and direct tiers for engines without L1."""
