"""Each kernel against its twin in plain Python and numpy."""

import sys
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server import kernels, optimizers, row_kernels
from embershard.parameter_server.placement_kernels import permute_all
from embershard.parameter_server.sums import sum_pushes
from embershard.parameter_server.tables import Initializer, Layout, Optimizer, Slab, TableError, TableSpec
from embershard.parameter_server.validation import readable

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import parameter_server_reference as reference

BLOCKS = 20
SPECS = (
    TableSpec(name="a", rows=101, width=3),
    TableSpec(name="b", rows=7, width=3),
    TableSpec(name="c", rows=1, width=3),
)
OPTIMIZERS = [
    Optimizer(kind="sgd"),
    Optimizer(kind="adagrad", initial_accumulator=0.1),
    Optimizer(kind="rowwise_adagrad"),
    Optimizer(kind="adam", beta2=0.99),
]


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def slab_of(*specs: TableSpec, blocks: int = BLOCKS) -> Slab:
    (slab,) = Layout(blocks, 0).add(specs)
    return slab


def identity(blocks: int = BLOCKS) -> np.ndarray:
    return np.arange(blocks, dtype=np.uint16)


def test_mix_and_permute_have_the_published_values() -> None:
    """These values are in every checkpoint: whoever changes them makes all of them unreadable."""
    assert int(kernels.mix64(np.uint64(1))) == 0x5692161D100B05E5
    assert [int(kernels.permute(r, 10, np.uint64(42))) for r in range(10)] == [3, 6, 7, 1, 5, 8, 0, 2, 4, 9]
    assert int(kernels.permute(123_456_789_012, 2**40 + 1, np.uint64(7))) == 575436447479


@pytest.mark.parametrize("n", [1, 2, 3, 255, 4097, 2**31 + 5, 2**48])
def test_permute_is_the_plain_feistel_network(n: int) -> None:
    key = 0xDEADBEEF12345678
    for row in {0, n - 1, *rng().integers(0, n, 20).tolist()}:
        position = int(kernels.permute(row, n, np.uint64(key)))
        assert position == reference.permute(row, n, key)
        assert int(kernels.unpermute(position, n, np.uint64(key))) == row


def test_many_rows_are_permuted_like_one() -> None:
    rows = rng().integers(0, 5000, 300).astype(np.uint64)
    expected = [int(kernels.permute(int(r), 5000, np.uint64(3))) for r in rows]
    permute_all(rows, 5000, np.uint64(3), np.empty(300, np.int32))
    assert rows.tolist() == expected


@pytest.mark.parametrize("kind", ["uniform", "normal", "constant"])
def test_initial_values(kind: str) -> None:
    spec = TableSpec(name="t", rows=45, width=5, initializer=Initializer(kind=kind, scale=0.25))
    for block in (0, 7, 19):
        rows = np.empty(kernels.share_rows(block, BLOCKS, spec.rows, np.uint64(spec.key)), np.int64)
        kernels.rows_of_share(block, BLOCKS, spec.rows, np.uint64(spec.key), rows)
        share = np.zeros((-(-spec.rows // BLOCKS), 5), np.float32)
        kernels.initialise_share(share, spec, block, BLOCKS, seed=11)
        for place, row in enumerate(rows.tolist()):
            assert reference.place(row, spec.rows, spec.key, BLOCKS) == (block, place)
            np.testing.assert_array_equal(share[place], reference.initial_row(spec, row, 11))
        assert np.isnan(share[len(rows) :]).all(), "places beyond the table's end must not pass for rows"


@pytest.mark.parametrize(("kind", "deviation"), [("uniform", 1 / np.sqrt(3)), ("normal", 1.0)])
def test_initial_values_have_the_stated_spread(kind: str, deviation: float) -> None:
    spec = TableSpec(name="t", rows=20_000, width=4, initializer=Initializer(kind=kind, scale=2.0))
    values = np.empty((20_000, 4), np.float32)
    kernels.initialise_share(values, spec, 0, 1, seed=0)
    assert abs(values.mean()) < 0.02
    np.testing.assert_allclose(values.std(axis=0), 2.0 * deviation, rtol=0.02)
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.03


def test_locate_against_the_plain_way() -> None:
    slab = slab_of(*SPECS)
    block_rank = rng().permutation(BLOCKS).astype(np.uint16)
    tables = np.array([1, 0, 2, 0, 1], np.int32)
    sizes = [4, 30, 2, 25, 0]
    segments = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.concatenate([rng().integers(0, SPECS[t].rows, s) for t, s in zip(tables, sizes, strict=True)]).astype(
        np.int64
    )
    found, inverse = kernels.locate(slab, tables, segments, rows, block_rank)

    expected = []
    for table, size, start in zip(tables, sizes, segments, strict=False):
        for row in rows[start : start + size].tolist():
            block, place = reference.place(row, SPECS[table].rows, SPECS[table].key, BLOCKS)
            expected.append(block * slab.rows_per_block + int(slab.base[table]) + place)
    assert found.index[inverse].tolist() == expected
    assert len(found.index) == len(set(expected))
    assert np.diff(block_rank[found.blocks].astype(int)).min() > 0, "blocks come in the order of their rank"
    assert (found.index // slab.rows_per_block == np.repeat(found.blocks, found.counts)).all()
    assert [(s.name, r) for s, r in (kernels.row_of(slab, i) for i in found.index[inverse])] == [
        (SPECS[np.repeat(tables, sizes)[i]].name, int(row)) for i, row in enumerate(rows)
    ]
    assert (found.index.dtype, found.blocks.dtype, found.counts.dtype) == (np.uint32, np.uint16, np.uint32)


def test_locate_does_not_depend_on_what_was_located_before() -> None:
    slab = slab_of(*SPECS)
    arguments = (slab, np.array([0], np.int32), np.array([0, 60]), rng().integers(0, 101, 60), identity())
    before = kernels.locate(*arguments)
    many = rng().integers(0, 100_000, 50_000)
    kernels.locate(
        slab_of(TableSpec(name="big", rows=100_000, width=3)), *arguments[1:2], np.array([0, 50_000]), many, identity()
    )
    after = kernels.locate(*arguments)
    np.testing.assert_array_equal(before[0].index, after[0].index)
    np.testing.assert_array_equal(before[1], after[1])


def test_locate_of_nothing() -> None:
    slab = slab_of(*SPECS)
    for tables, segments in (
        (np.zeros(0, np.int32), np.zeros(1, np.int64)),
        (np.array([1], np.int32), np.array([0, 0])),
    ):
        found, inverse = kernels.locate(slab, tables, segments, np.zeros(0, np.int64), identity())
        assert len(found.index) == len(found.blocks) == len(found.counts) == len(inverse) == 0


@pytest.mark.parametrize("row", [-1, 7, 2**62])
def test_locate_refuses_rows_outside_the_table(row: int) -> None:
    with pytest.raises(TableError, match=f"table 'b' has no row {row}: its rows are 0 to 6"):
        kernels.locate(
            slab_of(*SPECS), np.array([0, 1], np.int32), np.array([0, 2, 4]), np.array([100, 1, 3, row]), identity()
        )


def test_indices_are_64_bit_where_32_do_not_reach() -> None:
    slab = slab_of(TableSpec(name="large", rows=2**40 + 3, width=1), blocks=256)
    rows = np.array([0, 2**40 + 2, 5, 5], np.int64)
    found, inverse = kernels.locate(slab, np.zeros(1, np.int32), np.array([0, 4]), rows, identity(256))
    assert found.index.dtype == np.uint64
    assert [kernels.row_of(slab, i)[1] for i in found.index[inverse]] == rows.tolist()


def test_gather() -> None:
    weights = rng().normal(size=(50, 6)).astype(np.float32)
    index = rng().integers(0, 50, 33).astype(np.uint32)
    out = np.empty((33, 6), np.float32)
    kernels.gather(weights, index, out)
    np.testing.assert_array_equal(out, weights[index])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
@pytest.mark.parametrize("width", [1, 16, 19])
def test_updates_are_bit_identical_to_plain_float32(optimizer: Optimizer, width: int) -> None:
    generator = rng()
    weights = generator.normal(size=(40, width)).astype(np.float32)
    state = np.full((40, optimizer.state_width(width)), optimizers.initial_state(optimizer), np.float32)
    expected, expected_state = weights.copy(), state.copy()
    for _ in range(3):
        index = generator.permutation(40)[:25].astype(np.uint32)
        grads = generator.normal(size=(25, width)).astype(np.float32)
        optimizers.apply(optimizer, weights, state, readable(index), readable(grads), 0.05)
        for row, grad in zip(index, grads, strict=True):
            reference.update(optimizer, expected[row], expected_state[row], grad, 0.05)
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(state, expected_state)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_updates_agree_with_torch(kind: str) -> None:
    import torch

    weights = rng().normal(size=(1, 8)).astype(np.float32)
    optimizer = Optimizer(kind=kind, eps=1e-8)
    state = np.zeros((1, optimizer.state_width(8)), np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    theirs = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-8),
    }[kind]([parameter])
    for _ in range(5):
        grad = rng().normal(size=(1, 8)).astype(np.float32)
        optimizers.apply(optimizer, weights, state, readable(np.zeros(1, np.uint32)), readable(grad), 0.1)
        parameter.grad = torch.from_numpy(grad)
        theirs.step()
    np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 9999])
def test_all_finite(value: float, at: int) -> None:
    grads = np.full(10_000, -3.4e38, np.float32)
    assert kernels.all_finite(grads.view(np.uint32))
    grads[at] = value
    assert not kernels.all_finite(grads.view(np.uint32))


def test_check_rows() -> None:
    index = np.array([10, 19, 30, 39], np.uint32)
    blocks, counts = np.array([1, 3], np.uint16), np.array([2, 2], np.uint32)

    def check(blocks: np.ndarray = blocks, counts: np.ndarray = counts) -> tuple[int, int]:
        return kernels.check_rows(index, blocks, counts, 10, 4)

    assert check() == (row_kernels.FITS, -1)
    assert check(blocks=np.array([1, 4], np.uint16)) == (row_kernels.NO_SUCH_BLOCK, 1)
    assert check(blocks=np.array([3, 3], np.uint16)) == (row_kernels.BLOCK_TWICE, 1)
    assert check(counts=np.array([2, 2**32 - 1], np.uint32)) == (row_kernels.WRONG_COUNT, 2**32 + 1)
    for wrong in (9, 20, 2**32 - 1):
        index[1] = wrong
        assert check() == (row_kernels.MISPLACED, 1)


def test_sums_are_added_in_the_order_given() -> None:
    generator = rng()
    contributions, dense = [], np.zeros((500, 4), np.float32)
    for _ in range(3):
        index = generator.permutation(500)[:200].astype(np.uint32)
        grads = (generator.normal(size=(200, 4)) * 10.0 ** generator.integers(-4, 4, (200, 4))).astype(np.float32)
        dense[index] += grads
        contributions.append((readable(index), readable(grads)))
    index, sums = sum_pushes(contributions)
    assert len(set(index.tolist())) == len(index) == len({i for c, _ in contributions for i in c.tolist()})
    np.testing.assert_array_equal(sums, dense[index])
