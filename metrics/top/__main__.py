"""`python -m metrics.top`; the program is `metrics.top.terminal`."""

import sys

from metrics.top.terminal import main

sys.exit(main())
