"""``dicom:`` of predict.yaml: who may send images, which model answers, and where the reports go."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, field_validator

from consilium_shared.config import Strict
from consilium_shared.fields import Name

AeTitle = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]([A-Za-z0-9_.\- ]{0,14}[A-Za-z0-9_.\-])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Peer(Strict):
    """An archive or a scanner that may send, by title and address."""

    ae_title: AeTitle
    address: str

    @field_validator("address")
    @classmethod
    def _network(cls, address: str) -> str:
        try:
            ipaddress.ip_network(address)
        except ValueError:
            raise ValueError("an IP address, or a network such as 10.1.2.0/24") from None
        return address

    def sends_from(self, address: str) -> bool:
        """True for an IP address of this peer.

        >>> Peer(ae_title="PACS", address="10.1.2.0/24").sends_from("10.1.2.7")
        True
        """
        found = ipaddress.ip_address(address.split("%")[0])
        return (getattr(found, "ipv4_mapped", None) or found) in ipaddress.ip_network(self.address)


class Archive(Strict):
    """The archive that the reports go to."""

    ae_title: AeTitle
    address: str
    port: Port


class Dicom(Strict):
    """DICOM interface."""

    study: Name
    """Study whose model answers for the images."""
    ae_title: AeTitle = "CONSILIUM"
    address: str = "127.0.0.1"
    port: Port = 11112
    peers: Annotated[list[Peer], Field(min_length=1, max_length=256)]
    archive: Archive
    waiting: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Images, and reports, that wait; of more none is taken."""
    image_mib: Annotated[int, Field(ge=1, le=1024)] = 256

    def knows(self, title: str, address: str) -> bool:
        """True where a peer of this title may send from an IP address."""
        return any(peer.ae_title == title and peer.sends_from(address) for peer in self.peers)
