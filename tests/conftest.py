"""Settings that hold for every test."""

from hypothesis import settings

# Machines are noisy: an example may take long without being wrong.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
