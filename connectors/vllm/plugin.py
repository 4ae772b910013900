"""Registers the connector by its name, as one of vLLM's ``vllm.general_plugins`` entry points.

vLLM calls `register` in every process, maybe more than once. It imports nothing of the connector.
"""

from __future__ import annotations

NAME = "KVCacheConnector"


def register() -> None:
    """Let vLLM find the connector by ``kv_connector: KVCacheConnector``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvcache.connectors.vllm", NAME)
