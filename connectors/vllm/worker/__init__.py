"""The worker's side of the connector: copies between vLLM's KV cache and the slab."""
