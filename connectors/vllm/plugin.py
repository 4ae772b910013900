"""Registers the connector under its name, through vLLM's ``vllm.general_plugins`` entry points.

vLLM calls this in every process, perhaps more than once. It imports nothing of the connector.
"""

from __future__ import annotations

NAME = "KVCacheConnector"


def register() -> None:
    """Make ``kv_connector: KVCacheConnector`` known to vLLM."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvcache.connectors.vllm", NAME)
