"""Point-to-point weight transfer: each slice once, from a learner rank to an engine rank.

``messages``, ``wire`` and ``receiver`` also run inside SGLang's processes: they import torch,
xxhash and the standard library, nothing else.
"""
