"""Cellar of the house: errors and exit codes, atomic files, progress, hardware, provenance; imports nothing of ours."""
