"""For all tests."""

from hypothesis import settings

import consilium_client  # noqa: F401  # asks MKL for reproducible products, before any test computes one

settings.register_profile("without-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("without-deadline")
