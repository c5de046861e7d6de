"""Address space for every row, memory for those that are owned; and where compiled kernels are kept."""

import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from embershard.parameter_server import jit
from embershard.parameter_server.memory import SlabMemory, reserve
from embershard.parameter_server.snapshot import SlabCut
from embershard.parameter_server.tables import Layout, Optimizer, TableError, TableSpec
from embershard.parameter_server.validation import readable


def test_a_slab_far_larger_than_memory_costs_only_what_is_touched() -> None:
    (slab,) = Layout(65536, 0).add([TableSpec(name="t", rows=2**36, width=8)])
    before = psutil.Process().memory_info().rss
    memory = SlabMemory(slab)  # 2 TiB of weights
    weights, state = memory.block(40_000)
    weights[::2048], state[0] = 1.0, 2.0
    assert (weights[2048, 0], memory.weights[40_000 * slab.rows_per_block, 0]) == (1.0, 1.0)
    assert psutil.Process().memory_info().rss - before < 2 * weights.nbytes + (64 << 20)


def test_a_dropped_block_gives_its_pages_back() -> None:
    (slab,) = Layout(16, 0).add([TableSpec(name="t", rows=16 * 4096, width=4)])
    memory = SlabMemory(slab)
    memory.weights[:], memory.state[:] = 1.0, 2.0
    memory.drop(3)
    weights, state = memory.block(3)
    assert not weights.any()
    assert not state.any()
    memory.weights[3 * 4096 : 4 * 4096], memory.state[3 * 4096 : 4 * 4096] = 1.0, 2.0
    assert (memory.weights == 1.0).all(), "only that block was dropped"
    assert (memory.state == 2.0).all()


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_threads_divide_the_rows_and_change_nothing(kind: str) -> None:
    """Large enough to be divided: the same bits as by one thread, in every row."""
    rng = np.random.default_rng(0)
    (slab,) = Layout(8, 0).add([TableSpec(name="t", rows=16_000, width=8, optimizer=Optimizer(kind=kind))])
    index = readable(rng.permutation(8 * slab.rows_per_block)[:12_001].astype(np.uint32))
    grads = readable(rng.standard_normal((len(index), 8), dtype=np.float32))
    memories = [SlabMemory(slab), SlabMemory(slab)]
    for memory, threads in zip(memories, (1, 3), strict=True):
        memory.weights[:], memory.state[:] = 0.5, 0.25
        memory.update(index, grads, 0.1, threads)
    one, three = memories
    assert (one.weights[index] != 0.5).any(1).all()
    assert one.weights.tobytes() == three.weights.tobytes()
    assert one.state.tobytes() == three.state.tobytes()
    np.testing.assert_array_equal(three.read(index, 3), one.weights[index])


def test_too_much_address_space_is_refused_by_name() -> None:
    with pytest.raises(TableError, match="weights of the slab of table 't': cannot reserve"):
        reserve(2**62, "weights of the slab of table 't'")


def test_a_cut_keeps_each_row_once_and_reuses_what_was_written() -> None:
    (slab,) = Layout(10, 0).add([TableSpec(name="t", rows=500, width=4)])
    cut, pending = SlabCut(SlabMemory(slab), 10), np.ones(10, np.bool_)
    block_of = [readable(np.arange(50 * block, 50 * block + 50, dtype=np.uint32)) for block in range(10)]
    for _ in range(3):
        cut.save(block_of[0], pending)
    assert cut.entries == 50
    cut.copy_block(0)
    cut.save(block_of[1], pending)
    assert cut.entries == 50, "the places of block 0 are free again"
    cut.save(block_of[2], pending)
    assert cut.entries == 100


def test_kernels_are_kept_in_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = jit._temporary_folder()
    assert folder == str(tmp_path / f"embershard-numba-{os.getuid()}")
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    Path(folder).chmod(0o777)
    assert jit._temporary_folder() is None, "others could plant code in it"
    Path(folder).rmdir()
    Path(folder).symlink_to(tmp_path)
    assert jit._temporary_folder() is None


def test_without_any_folder_kernels_are_compiled_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(jit, "_finds_a_folder", lambda: False)
    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR"):
        assert jit._prepare_cache() is False
    monkeypatch.setattr(jit, "CACHED", False)

    @jit.jit
    def double(x: int) -> int:
        return 2 * x

    assert double(np.int64(21)) == 42
