"""What a run leaves behind: its directory, metrics, samples, evaluation figures and report."""
