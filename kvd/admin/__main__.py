"""`python -m kvd.admin`, as kvdctl."""

import sys

from kvd.admin.command import main

sys.exit(main())
