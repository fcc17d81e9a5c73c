"""A model on one device or as one rank: weights, steps, the way to and from the host, tuning."""
