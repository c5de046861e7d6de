"""Checkpoints: any number of shards loads what any other saved; damage is found and named; nothing half-loaded."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server import checkpoint, files, restore
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.checkpoint import CheckpointError
from embershard.parameter_server.requests import PushRequest, RowSet
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import Store, StoreError
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec

BLOCKS = 70
SPECS = [
    TableSpec(name="a", rows=300, width=3),
    TableSpec(name="b/with slash", rows=9, width=2, optimizer=Optimizer(kind="adam")),
    TableSpec(name="c", rows=40, width=3, optimizer=Optimizer(kind="sgd")),
]
NAMES = {spec.name: spec.name for spec in SPECS}


def make_shards(count: int, tables: list[TableSpec] = SPECS, blocks: int = BLOCKS, seed: int = 0) -> list[Shard]:
    shards = [Shard(i, Layout(blocks, seed)) for i in range(count)]
    for shard in shards:
        shard.set_block_map(BlockMap.initial(blocks, ("",) * count))
        shard.create_tables(tables)
    return shards


def disturb(shards: list[Shard], sequence: int = 1) -> None:
    """A push to every row of every table."""
    generator = np.random.default_rng(sequence)
    for shard in shards:
        owned = np.flatnonzero(shard.block_map.owned_by(shard.number)).astype(np.uint16)
        parts, grads = [], []
        for slab in shard.layout.slabs:
            rows = slab.rows_per_block
            index = (owned[:, None].astype(np.uint32) * rows + np.arange(rows, dtype=np.uint32)).reshape(-1)
            parts.append(RowSet(slab.id, index, owned, np.full(len(owned), rows, np.uint32)))
            grads.append(generator.normal(size=(len(index), slab.width)).astype(np.float32))
        shard.push(PushRequest(7, sequence, parts, grads, [0.1] * len(parts)), None, 0.0)


def everything(shards: list[Shard]) -> dict[int, dict[str, np.ndarray]]:
    return {
        block: shard.export_block(block)
        for shard in shards
        for block in np.flatnonzero(shard.block_map.owned_by(shard.number)).tolist()
    }


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for block, tensors in one.items():
        assert tensors.keys() == other[block].keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, other[block][name], err_msg=f"{name} of block {block}")


def save(shards: list[Shard], directory: Path | str, step: int = 5) -> str:
    blocks = [entry for shard in shards for entry in restore.write_blocks(shard.mark(), str(directory))]
    dense = checkpoint.write_dense(str(directory), {"w": np.arange(3.0)})
    checkpoint.commit(str(directory), shards[0].layout, step, blocks, dense, {"cursor": [1, 2], "loss": float("nan")})
    return str(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = make_shards(2)
    disturb(shards)
    return save(shards, tmp_path_factory.mktemp("saved") / "step-000000005")


@pytest.fixture
def copied(saved: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "step-000000005"))


def test_saved_on_any_number_of_shards_loaded_on_any_other(tmp_path: Path) -> None:
    shards = make_shards(1)
    disturb(shards)
    expected = everything(shards)
    for i, count in enumerate((1, 2, 3, 7, 3, 2, 7, 1)):
        directory = save(shards, tmp_path / str(i))
        shards = make_shards(count, seed=i)
        for shard in shards:
            restore.check_load(shard, directory, NAMES)
            report = restore.load_blocks(shard, directory, NAMES)
            assert report == {"tables": sorted(NAMES), "without_state": []}
        assert_same(everything(shards), expected)


def test_the_manifest_keeps_what_it_was_given(saved: str) -> None:
    manifest = checkpoint.read_manifest(saved)
    assert (manifest.step, manifest.blocks, manifest.seed, manifest.tables) == (
        5,
        BLOCKS,
        0,
        [SPECS[0], SPECS[1], SPECS[2]],
    )
    assert manifest.state["cursor"] == [1, 2]
    assert np.isnan(manifest.state["loss"])
    np.testing.assert_array_equal(checkpoint.read_dense(saved, manifest)["w"], np.arange(3.0))
    assert checkpoint.verify(saved) == []


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": (lambda d: flip(d / "blocks/block-00017.safetensors"), "block-00017.safetensors is damaged"),
    "a truncated block": (
        lambda d: (d / "blocks/block-00017.safetensors").write_bytes(b"short"),
        "block-00017.safetensors has 5 bytes",
    ),
    "a missing block": (
        lambda d: (d / "blocks/block-00017.safetensors").unlink(),
        "block-00017.safetensors is missing",
    ),
    "no manifest": (
        lambda d: (d / "manifest.json").unlink(),
        "manifest.json is missing; this is not a finished checkpoint",
    ),
    "a changed manifest": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace('"step": 5', '"step": 6')),
        "manifest.json is damaged",
    ),
    "a manifest that is no object": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a newer format": (lambda d: resign(d, format=2), "has format 2"),
    "a manifest that lacks a field": (lambda d: resign(d, seed=None), "has no valid seed"),
}


def resign(directory: Path, **changes) -> None:
    content = json.loads((directory / "manifest.json").read_text()) | changes
    del content["digest"]
    (directory / "manifest.json").write_text(json.dumps(content | {"digest": files.digest(files.canonical(content))}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(damage: str, copied: Path) -> None:
    harm, message = DAMAGE[damage]
    harm(copied)
    (shard,) = make_shards(1, seed=3)
    before = everything([shard])
    with pytest.raises(CheckpointError, match=message) as error:
        restore.check_load(shard, str(copied), NAMES)
    assert "\n" not in str(error.value)
    assert str(copied) in str(error.value)
    assert_same(everything([shard]), before)
    assert any(message in problem for problem in checkpoint.verify(str(copied)))


def test_the_newest_checkpoint_that_verifies(saved: str, tmp_path: Path) -> None:
    assert checkpoint.latest(str(tmp_path / "nowhere")) == (None, [])
    for step in (5, 40, 123, 1000):
        shutil.copytree(saved, tmp_path / f"step-{step:09d}")
    (tmp_path / "step-000001000" / "manifest.json").unlink()
    flip(tmp_path / "step-000000123" / "dense" / "dense.safetensors")
    newest, skipped = checkpoint.latest(str(tmp_path))
    assert newest == str(tmp_path / "step-000000040")
    assert [("step-000001000" in s, "step-000000123" in s) for s in skipped] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("tables", "names", "message"),
    [
        (
            [TableSpec(name="a", rows=301, width=3)],
            {"a": "a"},
            "table 'a' is 300 x 3 and table 'a' of this store 301 x 3",
        ),
        ([TableSpec(name="a", rows=300, width=4)], {"a": "a"}, "this store 300 x 4"),
        ([TableSpec(name="z", rows=300, width=3)], {"z": "z"}, "has no table 'z': it holds 'a', "),
        ([TableSpec(name="z", rows=300, width=3)], {"y": "a"}, "this store has no table 'y'"),
    ],
)
def test_tables_that_do_not_fit_are_named(saved: str, tables: list[TableSpec], names: dict, message: str) -> None:
    (shard,) = make_shards(1, tables)
    with pytest.raises(CheckpointError, match=message):
        restore.check_load(shard, saved, names)


def test_another_number_of_blocks_is_refused(saved: str) -> None:
    (shard,) = make_shards(1, blocks=80)
    with pytest.raises(CheckpointError, match=r"has 70 blocks and this store 80: open the store with store\.blocks=70"):
        restore.check_load(shard, saved, NAMES)


def test_another_optimizer_starts_with_its_own_state_and_says_so(saved: str) -> None:
    tables = [
        TableSpec(name="a", rows=300, width=3, optimizer=Optimizer(kind="adagrad", initial_accumulator=0.5)),
        SPECS[2],
    ]
    (shard,) = make_shards(1, tables)
    disturb([shard])
    assert restore.load_blocks(shard, saved, {"a": "a", "c": "c"}) == {"tables": ["a", "c"], "without_state": ["a"]}
    original = make_shards(1)
    restore.load_blocks(original[0], saved, NAMES)
    there, here = everything(original), everything([shard])
    for block in range(BLOCKS):
        np.testing.assert_array_equal(here[block]["a/weight"], there[block]["a/weight"])
        assert (here[block]["a/sum"] == 0.5).all()


def test_a_table_may_be_loaded_under_another_name(saved: str) -> None:
    """Its rows live in other blocks then: they follow from the name."""
    tables = [SPECS[2], TableSpec(name="renamed", rows=300, width=3)]
    shards = make_shards(3, tables)
    names = {"renamed": "a", "c": "c"}
    for shard in shards:
        assert restore.load_blocks(shard, saved, names)["without_state"] == []
    original = make_shards(1)
    restore.load_blocks(original[0], saved, NAMES)
    there, here = rows_by_number(original, "a"), rows_by_number(shards, "renamed")
    np.testing.assert_array_equal(here["weight"], there["weight"])
    np.testing.assert_array_equal(here["row_sum"], there["row_sum"])
    assert not (there["row_sum"] == 0).all()


def rows_by_number(shards: list[Shard], name: str) -> dict[str, np.ndarray]:
    from embershard.parameter_server.kernels import rows_of_share

    spec = shards[0].layout.find(name)
    parts: dict[str, np.ndarray] = {}
    for block, tensors in everything(shards).items():
        rows = np.empty(len(tensors[f"{name}/weight"]), np.int64)
        rows_of_share(block, BLOCKS, spec.rows, np.uint64(spec.key), rows)
        for part in ("weight", "row_sum"):
            values = tensors[f"{name}/{part}"]
            parts.setdefault(part, np.full((spec.rows, values.shape[1]), np.nan, np.float32))[rows] = values
    return parts


def test_the_ledger_goes_back_with_the_tables(saved: str) -> None:
    (shard,) = make_shards(1)
    disturb([shard], sequence=2)
    restore.load_blocks(shard, saved, NAMES)
    after = everything([shard])
    disturb([shard], sequence=1)  # in the checkpoint already
    assert_same(everything([shard]), after)
    disturb([shard], sequence=2)  # undone by the load, so it counts again
    assert not np.array_equal(everything([shard])[0]["a/weight"], after[0]["a/weight"])


def test_a_cut_that_cannot_be_written_is_given_up(tmp_path: Path) -> None:
    (shard,) = make_shards(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write blocks/block-00000\.safetensors"):
        restore.write_blocks(shard.mark(), str(tmp_path / "file"))
    cut = shard.mark()  # the failed one is closed
    with pytest.raises(StoreError, match="still writing the last checkpoint"):
        shard.mark()
    with pytest.raises(StoreError, match="block 3 of shard 0 is not in the checkpoint yet"):
        shard.load_block(3, shard.export_block(3))
    cut.close()
    shard.load_block(3, shard.export_block(3))


def test_a_disk_that_fills_leaves_the_previous_checkpoint_valid(tmp_path: Path) -> None:
    """The system itself refuses the bytes: no file of this process may grow beyond a few hundred."""
    with Store.open(shards=2, blocks=BLOCKS) as store:
        store.create_tables(SPECS)
        store.save(str(tmp_path / "step-000000001"), step=1).result()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
        try:
            with pytest.raises((StoreError, CheckpointError), match=r"step-000000002: cannot write .*: File too large"):
                store.save(str(tmp_path / "step-000000002"), step=2).result()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "step-000000002" / "manifest.json").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        assert checkpoint.latest(str(tmp_path))[0] == str(tmp_path / "step-000000001")
        store.save(str(tmp_path / "step-000000003"), step=3).result()  # with room again, the next one is written
        assert checkpoint.latest(str(tmp_path)) == (str(tmp_path / "step-000000003"), [])


def test_a_checkpoint_without_every_block_is_not_committed(tmp_path: Path) -> None:
    (shard,) = make_shards(1)
    entries = restore.write_blocks(shard.mark(), str(tmp_path))
    dense = checkpoint.write_dense(str(tmp_path), {})
    with pytest.raises(CheckpointError, match="block 4 of 70 was not written"):
        checkpoint.commit(str(tmp_path), shard.layout, 1, [e for e in entries if e.block != 4], dense, {})
    assert not (tmp_path / "manifest.json").exists()


def test_object_stores_work_like_folders() -> None:
    shards = make_shards(2)
    disturb(shards)
    directory = save(shards, "memory://checkpoints/step-000000005")
    (other,) = make_shards(1, seed=8)
    restore.load_blocks(other, directory, NAMES)
    assert_same(everything([other]), everything(shards))
    assert checkpoint.latest("memory://checkpoints") == (directory, [])
