"""What this machine can compute of a study with privacy, found out on invented records before anything is charged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_client.training.fit import Fit
    from consilium_client.training.gradients import Way


class Machine:
    """The machine that the agent runs on."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str, str, str, PrivacyPlan], Fit] = {}

    def fit(self, study: Study, plan: PrivacyPlan, device_name: str, way: Way) -> Fit:
        """Where and in which pieces the study is computed; found out once while the agent runs.

        Raises:
            MachineError: this machine cannot compute it.
            ConfigurationError: there is no such device.
        """
        from consilium_client.training.fit import fitting

        key = (study.digest, device_name, way, plan)
        if key not in self._fits:
            self._fits[key] = fitting(study, plan, device_name, way)
        return self._fits[key]
