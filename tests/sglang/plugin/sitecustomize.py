"""Python runs this at its start where this folder is in PYTHONPATH: in the servers of our tests and
in every process that they start, nowhere else.
"""

import sglang_on_cpu

sglang_on_cpu.install()
