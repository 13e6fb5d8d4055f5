"""Flower's application with only those of its layers that do something for a request.

Every request passes nine layers of middleware there, and each costs more than what it guards. Six of
them look at nothing but the Control interface, at a plugin for event logs that is not installed, or at a tracing that
is off; for requests to the fleet and runtime interfaces they are left out. Translation, authentication of nodes and the
translation of errors stay, and every other path keeps all nine.

Leans on these internals of flwr 1.41 (pinned): the classes of its middleware by name, and that those named here pass a
request on unchanged where its path is not under ``/v1/control/``, where no event log plugin is given, and where
``FLWR_TRACING_ENABLED`` is not set.
"""

from __future__ import annotations

from typing import Any

LIGHT_PATHS = ("/v1/fleet/", "/v1/runtime/")
IDLE_LAYERS = frozenset(
    {
        "ControlSensitiveResponseMiddleware",
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ControlEventLogMiddleware",
        "FleetEventLogMiddleware",
        "RuntimeTracingMiddleware",
    }
)


def without_idle_layers(application: Any) -> Any:
    """An ASGI application like ``application``, Flower's, before it has answered anything.

    Raises:
        RuntimeError: it has not the layers that this release of Flower has.
    """
    layers = list(application.user_middleware)
    missing = IDLE_LAYERS - {layer.cls.__name__ for layer in layers}
    if missing:
        raise RuntimeError(f"Flower's application has no {', '.join(sorted(missing))}")
    application.user_middleware = [layer for layer in layers if layer.cls.__name__ not in IDLE_LAYERS]
    light = application.build_middleware_stack()
    application.user_middleware = layers

    async def chosen(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(LIGHT_PATHS):
            scope["app"] = application
            await light(scope, receive, send)
        else:
            await application(scope, receive, send)

    return chosen
