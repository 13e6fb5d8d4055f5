"""Fixtures of the unit tests: a site's agent without its sockets, and its coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.site import CONTRACT, Coordinator, Site

from consilium_client.agent.administration import Administration
from consilium_client.commands import cli
from consilium_shared.errors import ConfigurationError


@pytest.fixture
def contract() -> dict[str, Any]:
    """That of a study with privacy."""
    return CONTRACT


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


@pytest.fixture
def site(coordinator: Coordinator) -> Iterator[Site]:
    made = Site(coordinator)
    yield made
    made.service.close()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Site], Site]:
    """``connect(site)``: the site's commands reach its agent without a socket."""

    def connected(site: Site) -> Site:
        service = Administration(site.service)

        def ask(_: Path, command: str, **arguments: Any) -> Any:
            answer = json.loads(service.handle(json.dumps({"command": command, **arguments}).encode()))
            if "value" not in answer:
                raise ConfigurationError(answer["error"])
            return answer["value"]

        monkeypatch.setattr(cli, "ask", ask)
        return site

    return connected


@pytest.fixture
def new_coordinator(tmp_path: Path) -> Callable[..., Coordinator]:
    """``new_coordinator(epsilon=…, policy=…)``: a federation whose site has that budget and that line of policy."""
    return lambda **changes: Coordinator(tmp_path, **changes)


@pytest.fixture
def new_site() -> Iterator[Callable[[Coordinator], Site]]:
    """``new_site(coordinator)``: an agent, closed at the end."""
    made: list[Site] = []

    def start(coordinator: Coordinator) -> Site:
        made.append(Site(coordinator))
        return made[-1]

    yield start
    for each in made:
        each.service.close()
