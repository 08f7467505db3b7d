"""Python runs this at its start wherever this folder is in PYTHONPATH: in the servers of our tests and
every process that they start, nowhere else.
"""

import sglang_on_cpu

sglang_on_cpu.install()
