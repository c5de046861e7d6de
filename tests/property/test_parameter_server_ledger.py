"""The ledger against a set of everything that was marked."""

import sys
from pathlib import Path

import numpy as np
from embershard.parameter_server.ledger import NEW, TOO_OLD, WINDOW, Ledger
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import parameter_server_reference as reference

BLOCKS = 5
CLIENTS = [3, 2**64 - 1, 17, 18, 19, 20]
calls = st.lists(
    st.tuples(
        st.sampled_from(CLIENTS),
        st.one_of(st.integers(0, 200), st.integers(2**62, 2**62 + 100)),
        st.sets(st.integers(0, BLOCKS - 1), min_size=1),
    ),
    max_size=60,
)


def replay(ledger: Ledger, model: reference.SetLedger, history: list[tuple[int, int, set[int]]]) -> None:
    for client, sequence, chosen in history:
        blocks = np.array(sorted(chosen))
        statuses = ledger.check(client, sequence, blocks)
        assert statuses.tolist() == [model.check(client, sequence, block) for block in blocks]
        if (statuses == TOO_OLD).any():
            continue
        new = blocks[statuses == NEW]
        ledger.mark(client, sequence, new)
        for block in new:
            model.mark(client, sequence, block)


@settings(max_examples=50, deadline=None)
@given(calls)
def test_ledger_is_a_set_with_a_window(history: list[tuple[int, int, set[int]]]) -> None:
    replay(Ledger(BLOCKS), reference.SetLedger(WINDOW), history)


@settings(max_examples=25, deadline=None)
@given(calls, calls)
def test_a_block_takes_its_ledger_along(before: list, after: list) -> None:
    """A copy, and a ledger put together from the exports of another, go on exactly like the original."""
    original, model = Ledger(BLOCKS), reference.SetLedger(WINDOW)
    replay(original, model, before)
    moved = Ledger(BLOCKS)
    moved.mark(99, 7, np.arange(BLOCKS))  # what an import replaces
    for block in range(BLOCKS):
        moved.import_block(block, original.export_block(block))
    assert (moved.check(99, 7, np.arange(BLOCKS)) == NEW).all()
    copied = original.copy()
    probe = reference.SetLedger(WINDOW)
    probe.seen = {key: set(seen) for key, seen in model.seen.items()}
    replay(copied, probe, after)
    replay(moved, model, after)


def test_dropped_blocks_and_generations_are_forgotten() -> None:
    ledger, blocks = Ledger(2), np.arange(2)
    for client in range(9):
        ledger.mark(client, 5, blocks, generation=client // 3)
    ledger.mark(9, 5, blocks)
    ledger.drop_generations_before(2)
    assert [ledger.check(client, 5, blocks).tolist() for client in (0, 5, 6, 8, 9)] == [[0, 0]] * 2 + [[1, 1]] * 3
    assert len(ledger) == 4
    ledger.drop_block(1)
    assert ledger.check(6, 5, blocks).tolist() == [1, 0]
