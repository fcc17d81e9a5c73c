"""Turns of threads that work with the same workers."""

from __future__ import annotations

import threading
import time

from wan_vae_parallel.workers.turn import Holder, Turn


def test_one_has_it_at_a_time():
    turn, one, other = Turn(), Holder(), Holder()
    assert turn.take(one)
    assert not turn.take(other)
    turn.give_back(other)  # which has not got it
    assert turn.held_by(one)
    turn.give_back(one)
    assert not turn.held
    assert turn.take(other)
    with turn.at_once() as free:
        assert not free
    assert turn.held_by(other)


def test_one_that_is_gone_keeps_nobody_waiting():
    turn, one, other = Turn(), Holder(), Holder()
    assert turn.take(one)
    threading.Timer(0.1, lambda: holders.clear()).start()
    holders = [one]
    del one
    assert not turn.take(other, 0.01)
    assert turn.take(other, 1.0)


def test_who_waits_hears_of_the_end_at_once():
    turn, one, other = Turn(), Holder(), Holder()
    assert turn.take(one)
    threading.Timer(0.1, turn.give_back, [one]).start()
    started = time.monotonic()
    assert turn.take(other, 60.0)
    assert time.monotonic() - started < 30
    assert turn.held_by(other)


def test_of_many_threads_only_one_is_within():
    turn, within, most, ends = Turn(), [], [], []

    def work():
        for _ in range(50):
            mine = Holder()
            while not turn.take(mine, 0.05):
                pass
            within.append(1)
            most.append(len(within))
            time.sleep(0.0002)
            within.pop()
            turn.give_back(mine)
        ends.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 4
    assert max(most) == 1


def test_a_word_that_comes_late_keeps_nobody_busy():
    turn, holder = Turn(), Holder()
    assert turn.take(holder)
    turn._free.set()  # of the one before, who was held up between its two steps
    began, worked = time.monotonic(), time.thread_time()
    assert not turn.take(Holder(), 0.3)
    assert time.thread_time() - worked < 0.5 * (time.monotonic() - began)
