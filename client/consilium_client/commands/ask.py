"""Commands to the running agent, over its administration socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from consilium_client.site import Home
from consilium_shared.errors import ConfigurationError, PolicyRefusal

SECONDS = 3600.0
"""A command waits as long: an estimate may read a large asset first."""


def ask(socket: Path, command: str, **arguments: Any) -> Any:
    """Give one command to the running agent.

    Raises:
        ConfigurationError: no agent runs, or it says that the command cannot be done as given.
        PolicyRefusal: the site's own policy or budget forbids it.
    """
    if not socket.exists():
        Home(socket.parents[1]).check_there()
        raise ConfigurationError(f"the site's programs are not running (no {socket}); start them: consilium-site up")
    from consilium_client.transport.agent_socket import call_admin  # grpc is slow to load

    answer = json.loads(call_admin(socket, json.dumps({"command": command, **arguments}).encode(), timeout=SECONDS))
    if "refused" in answer:
        raise PolicyRefusal(answer["refused"], answer["error"])
    if "error" in answer:
        raise ConfigurationError(answer["error"])
    return answer["value"]
