"""`python -m modelworker`."""

import sys

from modelworker.cli import main

sys.exit(main())
