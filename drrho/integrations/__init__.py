"""Adapters of the risks for other people's training loops: each is one file, and none repeats the mathematics."""
