"""Exit codes of `kvd`, `kvdctl` and `modelworker`; scripts and service managers rely on them."""

OK = 0
RUNTIME_ERROR = 1
USAGE = 2  # argparse's own
UNREACHABLE = 3  # no daemon answers
NOT_FOUND = 4  # no such pool
IN_USE = 5  # another daemon owns the sockets
TIMEOUT = 6
INCOMPATIBLE = 7  # the pool, or its daemon, is of another model, layout or protocol
PROBLEM_FOUND = 8  # verify or the demo found what should not be
INTERRUPTED = 130  # by Ctrl-C, as shells have it
BAD_CONFIG = 78  # EX_CONFIG of sysexits.h; starting again does not help
