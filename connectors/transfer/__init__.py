"""Transfers: copies of blocks between an engine's pages and the slots of a slab."""
