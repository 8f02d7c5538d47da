"""`python -m chiasm`."""

from __future__ import annotations

import sys

from chiasm.cli import main

sys.exit(main())
