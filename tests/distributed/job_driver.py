"""The launcher with a small script in place of the learner: ``job_driver.py SCRIPT LAYER ...``

Everything else is real: router, engines, files, supervision. The script gets the run directory.
"""

import logging
import sys
from pathlib import Path

from r1mega.cluster import commands, job
from r1mega.config import load


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    script, layers = sys.argv[1], sys.argv[2:]
    config = load(layers)
    folder = str(Path(config.run.root) / config.name)
    commands.learner_argv = lambda *args, **kwargs: [sys.executable, script, folder]
    return job.run("rl", config, layers)


if __name__ == "__main__":
    sys.exit(main())
