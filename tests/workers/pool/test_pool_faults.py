"""Workers that die, stop, fail or never start, as real processes on the CPU.

tests/gpu/test_pool_gpu.py has what differs there.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time

import pytest
import torch

import wan_vae_parallel as wvp
from tests.processes import gone, patience, wait_until
from tests.workers.pool.common import CLOSE, at, pids
from wan_vae_parallel.workers import pool as pool_module
from wan_vae_parallel.workers.process import WorkerProcess


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_the_middle_is_named_and_the_next_decode_works(vae, latents, rank):
    before = pids(vae)
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(before[rank], signal.SIGKILL)

    with pytest.raises(wvp.WorkerError) as raised:
        vae.decode(latents, on_chunk=at(5, kill))
    assert time.monotonic() - killed[0] < patience(10)
    assert f"worker {rank} on cpu died with exit code -9" in str(raised.value)
    assert "the next call starts new ones" in str(raised.value)
    assert all(map(gone, before))
    assert not vae.loaded


def test_a_death_that_is_noticed_late_still_names_the_one_that_died(vae, latents):
    # The others fail for want of their neighbour, and may have told so before the parent looks.
    before = pids(vae)

    def kill():
        os.kill(before[1], signal.SIGKILL)
        time.sleep(1.5)

    with pytest.raises(wvp.WorkerError, match="worker 1 on cpu died with exit code -9"):
        vae.decode(latents, on_chunk=at(1, kill))
    assert all(map(gone, before))


def test_a_worker_that_is_stopped_is_not_answering(vae, latents):
    before = pids(vae)
    stopped = []

    def stop():
        stopped.append(time.monotonic())
        os.kill(before[1], signal.SIGSTOP)

    with pytest.raises(wvp.WorkerError, match=rf"worker 1 on cpu is not answering .*process {before[1]}"):
        vae.decode(latents, on_chunk=at(5, stop))
    assert time.monotonic() - stopped[0] < patience(10)
    assert all(map(gone, before))


@pytest.mark.slow
def test_a_worker_that_is_stopped_between_steps_holds_up_neither_the_end_of_a_decode_nor_the_next(vae, latents):
    expected = vae.decode(latents)
    before = pids(vae)
    stream = vae.decode_stream(torch.cat([latents] * 3, dim=2))  # so many steps that it has some left
    next(stream)
    os.kill(before[1], signal.SIGSTOP)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < patience(10)
    # Who wants the workers next gets others.
    assert torch.equal(vae.decode(latents), expected)
    assert all(map(gone, before))


def test_a_worker_that_dies_after_its_answer_is_noticed_though_the_others_go_on(vae):
    # Of two the first has answered and died; the second, which waits for it on its device, only says that it lives.
    class Stub:
        def __init__(self, rank, messages, alive):
            self.rank, self.messages = rank, messages
            self.connection, self.theirs = multiprocessing.Pipe()
            for message in messages:
                self.theirs.send(message)
            self.exit_code, self.pid, self.heard = None if alive else 1, 0, time.monotonic()
            self.alive, self.stopped = alive, False
            if not alive:
                self.theirs.close()

        def __str__(self):
            return f"stub {self.rank}"

        def join(self, _seconds):
            return not self.alive

        def last_lines(self):
            return ""

    pool = vae._engine
    real, pool.workers = pool.workers, [Stub(0, [("done", 1)], alive=False), Stub(1, [("alive",)] * 3, alive=True)]
    try:
        with pytest.raises(wvp.WorkerError, match="stub 0 died with exit code 1"):
            pool.gather("done", 2)
    finally:
        pool.workers = real


def test_a_worker_that_is_stopped_while_it_starts_is_not_answering(path, latents, monkeypatch):
    monkeypatch.setattr("wan_vae_parallel.workers.crew._SILENCE_SECONDS", 1.0)

    def stop(vae):
        assert wait_until(lambda: len(vae._engine.workers) == 2, 20)
        os.kill(pids(vae)[1], signal.SIGSTOP)

    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        thread = threading.Thread(target=stop, args=(vae,))
        thread.start()
        with pytest.raises(wvp.WorkerError, match="worker 1 on cpu is not answering"):
            vae.decode(latents)
        thread.join()
        assert pids(vae) == []


def test_a_worker_that_is_made_while_the_pool_is_released_does_not_stay(path, latents, monkeypatch):
    made = []

    class Released(WorkerProcess):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            vae.release()

    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        vae.release()  # those that loading it has prepared
        monkeypatch.setattr(pool_module, "WorkerProcess", Released)
        with pytest.raises(wvp.WorkerError, match="ended while they started"):
            vae.decode(latents)
    assert len(made) == 1
    assert gone(made[0].pid)


def test_plans_hear_of_kernels_that_failed_in_a_worker(vae, latents, monkeypatch):
    real = vae._engine.gather
    heard = []

    def gather(kind, *args, **options):
        answers = real(kind, *args, **options)
        if kind == "finished":
            heard.append(list(answers))
            answers[1] = ("finished", True)
        return answers

    noted = []
    monkeypatch.setattr(vae._engine, "gather", gather)
    monkeypatch.setattr(pool_module, "note_failed", noted.append)
    vae.decode(latents)
    assert heard == [[("finished", False)] * len(vae._engine.workers)]
    assert noted == [vae._engine.workers[1].device]


def test_an_interrupt_while_a_decode_is_being_ended_leaves_no_half_ended_workers(vae, latents, expected):
    before = pids(vae)
    real = vae._engine.gather

    def interrupted(kind, *args, **options):
        if kind == "finished":
            raise KeyboardInterrupt
        return real(kind, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae._engine, "gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vae.decode(latents)
    assert all(map(gone, before))
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


@pytest.mark.parametrize(
    "encoding", [pytest.param(False, id="decode"), pytest.param(True, id="encode", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("when", ["it has its turn", "its run is not kept yet", "it gives its turn back"])
def test_an_interrupt_at_any_moment_leaves_the_turn_to_the_next(vae, latents, expected, when, encoding):
    pool = vae._engine
    begin = "encode" if encoding else "run"
    taken, begun = pool._turn.take, getattr(pool, begin)

    def interrupted(real=lambda *_: None):
        def call(*arguments):
            result = real(*arguments)  # noqa: F841 (the caller never gets it)
            raise KeyboardInterrupt

        return call

    with pytest.MonkeyPatch.context() as patch:
        if when == "it has its turn":
            patch.setattr(pool._turn, "take", interrupted(taken))
        elif when == "its run is not kept yet":
            patch.setattr(pool, begin, interrupted(begun))
        else:
            patch.setattr(pool, "leave", interrupted())
        with pytest.raises(KeyboardInterrupt):
            vae.encode(expected) if encoding else vae.decode(latents)
    before, ends = time.monotonic(), []

    def give_up():
        if time.monotonic() > before + patience(20):
            raise TimeoutError("nobody has the turn, and it is waited for")

    thread = threading.Thread(target=lambda: ends.append(vae.decode(latents, on_wait=give_up)))
    thread.start()
    thread.join()
    torch.testing.assert_close(ends[0], expected, **CLOSE)
    assert not pool._turn.held


@pytest.mark.parametrize(
    "seen", [pytest.param(True, id="seen before", marks=pytest.mark.slow), pytest.param(False, id="in the decode")]
)
@pytest.mark.parametrize("stage", ["ready", "parked", "prepared"])
def test_a_worker_killed_between_decodes_costs_no_error(vae, latents, expected, caplog, stage, seen):
    caplog.set_level(logging.INFO)
    if stage == "parked":
        assert vae.park()
    if stage == "prepared":
        vae.release()
        vae._engine.prepare()
    pool, before = vae._engine, pids(vae)
    with pytest.MonkeyPatch.context() as patch:
        if seen:
            os.kill(before[1], signal.SIGKILL)
            assert wait_until(lambda: not pool.workers[1].alive, 5)
        else:
            real = pool.tell

            def tell(kind, *message):
                if kind in ("load", "open") and pids(vae) == before:
                    os.kill(before[1], signal.SIGKILL)
                real(kind, *message)

            patch.setattr(pool, "tell", tell)
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)
    assert all(map(gone, before))
    assert "used last; starting new ones" in caplog.text
    assert "(first)" in caplog.text


@pytest.mark.parametrize("begun", [False, True], ids=["new ones too", "once they have begun"])
def test_workers_that_are_killed_again_are_an_error(vae, latents, expected, begun):
    pool, killed = vae._engine, []
    real = pool.tell

    def tell(kind, *message):
        if kind == ("begin" if begun else "open"):
            killed.append(pids(vae)[1])
            os.kill(killed[-1], signal.SIGKILL)
        real(kind, *message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "tell", tell)
        with pytest.raises(wvp.WorkerError, match="worker 1 on cpu died with exit code -9") as raised:
            vae.decode(latents)
    assert raised.value.killed
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # as from a process pool
    assert len(killed) == (1 if begun else 2)
    torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_a_file_that_vanished_or_broke_is_an_error_and_its_return_is_none(
    path, tmp_path, latents, expected, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # see the next test
    copy, aside = tmp_path / "vae.safetensors", tmp_path / "aside"
    shutil.copy2(path, copy)
    with wvp.load_vae(copy, devices="cpu,cpu", chunk=1) as vae:
        copy.rename(aside)
        with pytest.raises(wvp.CheckpointError):
            vae.decode(latents)
        copy.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(wvp.CheckpointError):
            vae.decode(latents)
        assert pids(vae) == []
        aside.replace(copy)
        torch.testing.assert_close(vae.decode(latents), expected, **CLOSE)


def test_a_start_that_fails_leaves_no_folder(path, tmp_path, latents, monkeypatch):
    copy, temporary = tmp_path / "vae.safetensors", tmp_path / "temporary"
    shutil.copy2(path, copy)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with wvp.load_vae(copy, devices="cpu,cpu", chunk=1) as vae:
        copy.unlink()
        for _ in range(2):
            with pytest.raises(wvp.CheckpointError):
                vae.decode(latents)
    assert os.listdir(temporary) == []


def test_an_error_in_a_worker_is_told_with_its_rank_and_last_lines(path, latents, monkeypatch):
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        real = pool_module.share_weights

        def incomplete(checkpoint, part, dtype):
            memory, manifest = real(checkpoint, part, dtype)
            del manifest["tensors"]["decoder.conv1.weight"]
            return memory, manifest

        monkeypatch.setattr(pool_module, "share_weights", incomplete)
        with pytest.raises(
            wvp.WorkerError, match=r"(?s)worker [01] on cpu failed: RuntimeError: .*Missing key.*decoder.conv1.weight"
        ) as e:
            vae.decode(latents)
        assert "its last lines:\n" in str(e.value)
        assert "Traceback" in str(e.value)
        assert pids(vae) == []


def test_a_group_that_can_not_be_joined_is_an_error_with_its_reason_and_a_way_out(path, latents, monkeypatch):
    for module in ("pool", "failures"):
        monkeypatch.setattr(f"wan_vae_parallel.workers.{module}.INTERFACE", "wan0")
    with wvp.load_vae(path, devices="cpu,cpu", chunk=1) as vae:
        with pytest.raises(wvp.WorkerError, match=r"worker \d on cpu can't find .*interface wan0, .*bring it up"):
            vae.decode(latents)
        assert pids(vae) == []
        monkeypatch.undo()
        vae.decode(latents)
