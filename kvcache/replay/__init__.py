"""Replay: a trace of requests through the index and the policies of the live stack, without bytes.

``trace`` is the format, ``generators`` make traffic, ``simulate`` drives the indexes, ``belady`` is
the optimum, ``jobs`` runs many of them at once.
"""
