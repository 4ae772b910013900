"""The scheduler's side of the connector: hits, stores and jobs; no tensors and no bytes."""
