"""Starts the SuperLink: ``python -m consilium_server.superlink --home HOME …``."""

import sys

from consilium_server.superlink.main import main

sys.exit(main())
