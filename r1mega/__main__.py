"""``python -m r1mega`` is ``r1mega``: the launcher starts learner ranks this way."""

import sys

from r1mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
