"""Starts one study's process: ``python -m consilium_server.study --home HOME STUDY``."""

import sys

from consilium_server.study.main import main

sys.exit(main())
