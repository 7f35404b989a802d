"""`python -m calm_rt` is `calm-rt`."""

import sys

from calm_rt.cli import main

sys.exit(main())
