"""Starts the site's agent: ``python -m consilium_client.agent --home HOME``."""

import sys

from consilium_client.agent.main import main

sys.exit(main())
