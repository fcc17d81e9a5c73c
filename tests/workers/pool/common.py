"""What the tests of a pool share."""

from __future__ import annotations

CLOSE = {"atol": 1e-5, "rtol": 0}
FRAMES = 13
ROOM = 6 * 2**20


def pids(vae):
    return [worker.pid for worker in vae._engine.workers]


def at(frame, action):
    """A callback that does ``action()`` once, when ``frame`` is done."""
    did = []

    def on_chunk(done, _total, _frames):
        if done >= frame and not did:
            did.append(True)
            action()

    return on_chunk
