"""Lower tiers: promotion of their blocks to L1, and write-behind of L1's blocks to them."""
