"""Cancelling what a decode waits for."""

from __future__ import annotations

import threading

import pytest

from wan_vae_parallel.cancel import cancellable, check_cancelled


class Interrupt(Exception):
    """What a user interface raises."""


def raising():
    raise Interrupt


def test_nothing_is_cancelled_without_a_check():
    check_cancelled()


def test_what_the_check_raises_passes_handlers_for_failures():
    failures = []

    def work():
        try:
            check_cancelled()
        except Exception as failure:  # noqa: BLE001 (as those have who try something else after one)
            failures.append(failure)

    with pytest.raises(Interrupt), cancellable(raising):
        work()
    assert failures == []
    check_cancelled()


def test_anything_can_be_raised():
    def stop():
        raise StopIteration("done")

    with pytest.raises(StopIteration, match="done"), cancellable(stop):
        check_cancelled()


def test_another_threads_decode_is_another_one():
    seen = []
    with cancellable(raising):
        thread = threading.Thread(target=lambda: seen.append(check_cancelled()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_the_inner_check_counts_and_then_the_outer_one_again():
    calls = []
    with cancellable(lambda: calls.append("outer")):
        with cancellable(lambda: calls.append("inner")):
            check_cancelled()
        check_cancelled()
    assert calls == ["inner", "outer"]
