"""``python -m r1mega`` is ``r1mega``: the launcher starts learner ranks this way."""

import logging
import os
import sys

from r1mega.cli import is_rank, main

if __name__ == "__main__":
    status = main()
    if is_rank():
        # Gloo's threads may still be dropping tensors, for which they ask for the interpreter: one
        # that is shutting down ends them, and with them the process, by SIGABRT.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
