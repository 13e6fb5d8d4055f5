"""Contents of site.yaml: assets, policy, device, intake."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from consilium_client.data.asset import AssetSpec
from consilium_client.intake.settings import Intake
from consilium_client.policy import SitePolicy
from consilium_shared.config import Strict
from consilium_shared.fields import Name
from consilium_shared.process.notices import Notify


class SiteConfig(Strict):
    """site.yaml: what data there is, what the hospital permits, where to compute."""

    site: Name
    assets: dict[Name, AssetSpec] = Field(default_factory=dict)
    policy: SitePolicy
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = "auto"
    gradients: Literal["book-keeping", "opacus"] = "book-keeping"
    """Method for per-patient gradients (``dpsgd/engines.py``): the fast way, or the reference."""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that decode and prepare data at once; null for one for each core that this account may use."""
    notify: Notify | None = None
    """Receivers of notices about proposals, absences and the connection. The agent has no business with it."""
    intake: Intake | None = None
    """Sources of data in the hospital's systems. The agent has no business with it."""
