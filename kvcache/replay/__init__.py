"""Replays a trace of requests through the live index and eviction policies, without bytes.

``trace`` reads the format; ``recorder`` writes it from a live engine; ``generators`` makes
synthetic traffic; ``simulate`` drives the indexes, and ``groups`` that of a model with several KV
cache groups; ``belady`` computes the optimum; ``oracle`` adds hints; ``jobs`` runs many replays in
several processes.
"""
