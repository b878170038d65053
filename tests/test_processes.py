"""Processes that share work, as threads with a store of one process; real ones are in `cli/test_interrupted.py`."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from diffusers_infogain import processes
from diffusers_infogain.processes import ALONE, OtherProcessFailedError, Processes, batches_of


def together(count: int, work) -> list:
    """What `work` returns in each of the processes, or the error that it ends with."""
    store, results = torch.distributed.HashStore(), [None] * count

    def run(index):
        own = Processes(index, count, store)
        try:
            results[index] = work(own)
            own.to_main()
        except Exception as error:
            own._fails_first()
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def squares(own: Processes, batches, pause=lambda own, batch: 0.0):
    made = []

    def work(batch):
        time.sleep(pause(own, batch))
        made.append(batch)
        return [number * number for number in batch]

    return list(own.map(work, batches, "", "number", bar=False)), made


def test_batches_hold_all_items_in_order():
    assert batches_of(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert batches_of([], 3) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_batch_is_made_once_and_the_main_process_gets_all_results_in_order(count):
    batches = batches_of(range(23), 2)
    found = together(count, lambda own: squares(own, batches)) if count > 1 else [squares(ALONE, batches)]
    assert found[0][0] == [[number * number for number in batch] for batch in batches]
    assert sorted(batch for _, made in found for batch in made) == batches
    assert all(results == [] for results, _ in found[1:])


def test_a_free_process_takes_the_next_batch():
    batches = batches_of(range(12), 1)
    found = together(2, lambda own: squares(own, batches, lambda own, batch: 0.5 if batch == [0] else 0.01))
    assert sorted(map(len, (made for _, made in found))) == [1, 11]
    assert found[0][0] == [[number * number] for number in range(12)]


def test_a_result_waits_for_those_before_it_only():
    """The main process makes batches 0 and 2 at once, and the other one has batch 1, which takes longer."""
    store, seen, may_end = torch.distributed.HashStore(), [], threading.Event()

    def other():
        own = Processes(1, 2, store)
        list(own.map(lambda batch: may_end.wait(10) and batch, [[0], [1], [2]], "", "number", bar=False))

    def work(batch):
        if batch == [0]:
            thread.start()
            while store.add("1/next", 0) < 2:  # until the other has taken its batch
                time.sleep(0.001)
        return batch

    thread = threading.Thread(target=other)
    for result in Processes(0, 2, store).map(work, [[0], [1], [2]], "", "number", bar=False):
        seen.append(result)
        if result == [0]:
            assert not may_end.is_set()
            may_end.set()
    thread.join(10)
    assert seen == [[0], [1], [2]]


def test_others_go_on_while_the_main_process_is_still_busy():
    times = {}

    def work(own):
        for stage in range(2):
            for _ in own.map(lambda batch: 0, [[0], [1]], "", "number", bar=False):
                pass
            times[own.index, stage] = time.monotonic()
            if own.is_main:
                time.sleep(0.3)

    together(2, work)
    assert times[1, 1] < times[0, 1]


def test_all_get_what_the_main_process_says():
    value = {"a": [1, None, "é\ud800"], "long": "x" * 10_000_000}
    assert together(3, lambda own: own.from_main(value if own.is_main else None)) == [value] * 3
    assert ALONE.from_main(value) is value


def test_if_one_fails_all_end():
    made = []

    def work(own):
        if own.index == 1:
            raise ValueError("no memory")
        list(own.map(lambda batch: made.append(batch) or time.sleep(0.02), [[0]] * 50, "", "number", bar=False))

    found = together(3, work)
    assert len(made) < 50
    assert str(found[1]) == "no memory"
    assert all(isinstance(found[index], OtherProcessFailedError) for index in (0, 2))


def test_only_the_first_failure_counts():
    store = torch.distributed.HashStore()
    assert Processes(1, 3, store)._fails_first()
    assert not Processes(0, 3, store)._fails_first()
    assert ALONE._fails_first()
    assert ALONE._fails_first()


def test_a_lost_connection_is_named():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    own = Processes(1, 2, torch.distributed.PrefixStore("a", client))
    assert not own._has("x")
    del server
    with pytest.raises(OtherProcessFailedError, match="the connection to the main process or its launcher is lost"):
        own.from_main()


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, (0, 1)), ({"RANK": "0"}, (0, 1)), ({"WORLD_SIZE": "4"}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4))],
)
def test_the_launchers_variables_are_read(monkeypatch, variables, found):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.launched() == found


@pytest.mark.parametrize(("rank", "size"), [("a", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_wrong_variables_of_a_launcher_are_named(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    message = f"RANK and WORLD_SIZE, which a launcher sets, must be an index and a number, got '{rank}' and '{size}'."
    with pytest.raises(ValueError, match=message):
        processes.launched()
    assert processes.place() == ""
