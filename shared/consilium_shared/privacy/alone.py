"""Cost of a study by a site's own share of the noise: what is left should nobody else's protect it."""

from __future__ import annotations

from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.study import Study


def cost_alone(study: Study) -> float | None:
    """ε that a site's own share of the noise alone gives a study's contract; None where no noise is shared.

    Raises:
        ConfigurationError, BudgetRefused: as ``plan_of``.
    """
    if study.privacy.sums is None or study.privacy.sums.honest_sites == 1:
        return None
    plan = plan_of(study, 0)
    return plan.cost_alone() if isinstance(plan, PrivacyPlan) else None
