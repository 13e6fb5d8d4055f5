"""The environment in which every process of ours that uses Flower runs. No flwr here: it must come first."""

from __future__ import annotations

import os
from pathlib import Path


def set_flower_environment(flower_home: Path) -> None:
    """Switch off everything in Flower that speaks to others, and give it a private home. Call before flwr starts.

    A proxy for the outside stays in use; this machine's own addresses are never asked for through it.
    """
    os.environ.update(
        FLWR_HOME=str(flower_home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    )
    names = ("NO_PROXY", "no_proxy")
    listed = next((os.environ[name] for name in names if os.environ.get(name)), "")
    hosts = [host for host in listed.split(",") if host]
    value = ",".join([*hosts, *(host for host in ("127.0.0.1", "localhost") if host not in hosts)])
    os.environ.update(dict.fromkeys(names, value))
