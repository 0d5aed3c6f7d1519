"""Timings, memory and accuracy of the risks, side by side with other packages; ``core.py`` is the entry."""
