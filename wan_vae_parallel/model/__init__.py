"""The decoder as plain modules: no ranks, no devices, no files."""
