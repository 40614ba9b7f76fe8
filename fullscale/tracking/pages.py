"""Addresses of MLflow's pages, for messages."""

from __future__ import annotations

import re

from fullscale.tracking.store import Store, connect

MODE = "workflowType=machine_learning"
"""Query of an address: without it MLflow shows its menu for language models."""


def run_url(store: Store, run_id: str) -> str | None:
    """Return the address of a run's page, without credentials; None without a server."""
    address = _address(store)
    if address is None:
        return None
    _, experiment_id = connect(store)
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}?{MODE}"


def version_url(store: Store, model_name: str, version: str) -> str | None:
    """Return the address of a registered version's page; None without a server."""
    address = _address(store)
    return address and f"{address}/#/models/{model_name}/versions/{version}?{MODE}"


def models_url(uri: str) -> str:
    """Return the address of the list of models of a server; other stores are returned as such."""
    address = _address(Store(uri))
    return uri if address is None else f"{address}/#/models?{MODE}"


def _address(store: Store) -> str | None:
    if not store.uri.startswith(("http://", "https://")):
        return None
    return re.sub(r"//[^/@]*@", "//", store.uri).rstrip("/")
