"""Processes, one a device, that work on one video together; and what watches over them."""
