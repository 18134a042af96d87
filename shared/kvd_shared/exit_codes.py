"""Exit codes of `kvd`, `kvdctl` and `modelworker`; scripts and units rely on them."""

OK = 0
RUNTIME_ERROR = 1
USAGE = 2  # argparse's own
UNREACHABLE = 3  # no daemon answers
NOT_FOUND = 4  # no such pool, session or page
IN_USE = 5  # another daemon owns the sockets
TIMEOUT = 6
INCOMPATIBLE = 7  # the pool is of another model, layout or protocol
PROBLEM_FOUND = 8  # verify, doctor or the demo found what should not be
INTERRUPTED = 130  # by Ctrl-C, as shells have it
BAD_CONFIG = 78  # EX_CONFIG of sysexits.h; the units do not restart on it
