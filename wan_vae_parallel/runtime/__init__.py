"""Running a decoder on a device: weights, steps, the way of the frames to the host."""
