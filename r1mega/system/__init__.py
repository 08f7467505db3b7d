"""Processes and their end, killable workers, atomic files: what every floor above needs."""
