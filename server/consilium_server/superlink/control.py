"""The SuperLink's private side, as the coordinator's own processes use it: its SuperNodes, and whether it answers.

Leans on these internals of flwr 1.41 (pinned): ``ControlHttpClient`` and its protobuf requests. flwr is imported only
after its environment is set.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from consilium_server.superlink.settings import SuperLinkSettings, set_flower_environment
from consilium_shared.errors import ConfigurationError, TransportError

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.control.control_http_client import ControlHttpClient

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_control(settings: SuperLinkSettings) -> Iterator[ControlHttpClient]:
    """A client of the Control interface; failures of the network and refusals become TransportError."""
    set_flower_environment(settings)
    import httpx
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    token = settings.control_token()

    class Bearer:
        def intercept(self, context: Any, call_next: Any) -> httpx.Response:
            context.request.headers["authorization"] = f"Bearer {token}"
            response: httpx.Response = call_next(context)
            return response

    client = ControlHttpClient.from_server_address(
        settings.private_address,
        False,
        settings.ca_certificate.read_bytes(),
        [RuntimeVersionHttpInterceptor(component_name="consilium"), Bearer()],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise TransportError(f"The SuperLink refused a request (HTTP {error.response.status_code}).") from None
    except httpx.TransportError as error:
        raise TransportError(
            f"The SuperLink does not answer on {settings.private_address} ({type(error).__name__}). "
            "Is `consilium-server up` running?"
        ) from None
    finally:
        client._client.close()


def wait_until_ready(settings: SuperLinkSettings, timeout: float = 30.0) -> None:
    """Wait until the SuperLink answers on its private side.

    Raises:
        TransportError: not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            node_names(settings)
        except (TransportError, ConfigurationError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def node_names(settings: SuperLinkSettings) -> dict[str, int]:
    """Site name -> node id of every registered SuperNode."""
    return {node.name: node.node_id for node in _nodes(settings)}


def online_nodes(settings: SuperLinkSettings) -> set[str]:
    """Names of the sites whose SuperNode is connected now."""
    return {node.name for node in _nodes(settings) if node.status == "online"}


def register_nodes(settings: SuperLinkSettings, keys: Mapping[str, bytes]) -> dict[str, int]:
    """Make the SuperLink's list of SuperNodes equal to ``keys``; a second call changes nothing.

    A SuperNode that is not in ``keys`` is unregistered, which is how a site is removed; Flower never takes that
    key again, so such a site enrolls anew.

    Args:
        settings: of the running SuperLink.
        keys: site name -> public ECDSA key (NIST curve), OpenSSH line or PEM; empty once the last site was removed.

    Returns:
        Site name -> node id.

    Raises:
        ConfigurationError: a key that is not ECDSA, a key used before, or one key for two sites.
        TransportError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest

    wanted = {site: _normal_key(site, key) for site, key in keys.items()}
    if len(set(wanted.values())) != len(wanted):
        raise ConfigurationError("Two sites of the roster have the same SuperNode key. Enroll one of them anew.")
    registered: dict[str, int] = {}
    known = {(node.name, node.public_key): node.node_id for node in _nodes(settings)}
    with open_control(settings) as control:
        for (name, key), node_id in known.items():
            if wanted.get(name) == key:
                registered[name] = node_id
            else:
                control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
                logger.warning("unregistered the SuperNode %r: it is not in the roster", name)
        for site in wanted.keys() - registered.keys():
            request = RegisterNodeRequest(public_key=wanted[site], name=site)
            registered[site] = _register(control, site, request)
    return registered


def _register(control: ControlHttpClient, site: str, request: Any) -> int:
    import httpx

    try:
        return int(control.RegisterNode(request).node_id)
    except httpx.HTTPStatusError as error:
        raise ConfigurationError(
            f"The SuperLink does not take the SuperNode key of {site!r} (HTTP {error.response.status_code}). A key "
            "that was removed once cannot come back: run `consilium-site enroll` with a new key there."
        ) from None


def _nodes(settings: SuperLinkSettings) -> list[Any]:
    from flwr.proto.control_pb2 import ListNodesRequest

    with open_control(settings) as control:
        found = control.ListNodes(ListNodesRequest()).nodes_info
    return [node for node in found if node.status != "unregistered"]


def _normal_key(site: str, key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        ssh = key.startswith(b"ecdsa-sha2-")
        public = serialization.load_ssh_public_key(key) if ssh else serialization.load_pem_public_key(key)
    except ValueError:
        public = None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ConfigurationError(f"The SuperNode key of {site!r} is not an ECDSA public key.")
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
