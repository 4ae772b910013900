"""What makes blocks of two engines equal: configuration, weights, adapters."""
