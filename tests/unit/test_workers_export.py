"""A trained checkpoint becomes a file that answers as training did, in every format and with every method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embershard.datasets.schema import DataConfig
from embershard.datasets.synthetic import generate
from embershard.parameter_server.checkpoint import CheckpointError
from embershard.parameter_server.store import Store
from embershard.workers import export as export_module
from embershard.workers import export_files, export_lookup
from embershard.workers.embeddings import kernels, planning
from embershard.workers.embeddings.base import EmbeddingError, RowMap
from embershard.workers.embeddings.memcom import MEmCom
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.evaluate import open_network
from embershard.workers.export import export
from embershard.workers.export_files import ExportDiffers, ExportError
from embershard.workers.job import TrainConfig, TrainingJob
from embershard.workers.models.build import ModelConfig
from embershard.workers.serving import RowMaps
from embershard.workers.trainer import train

CARDINALITIES = (7, 300, 400)
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "hash": {"ratio": 4},
    "qr": {"rows": 8, "threshold": 10},
    "qr-concat": {"rows": 8, "operation": "concat"},
    "memcom": {"rows": 30, "bias": True, "threshold": 10},
    "double_hash": {"rows": 30, "threshold": 10},
    "mlet": {"inner_dim": 16},
    "narrow": {"inner_dim": 2},
    "mem_rec": {"token_rows": 50, "hashes": 3, "scope": "field"},
    "mem_rec-sample": {"token_rows": 50, "hashes": 3, "scope": "sample"},
}
MIXED: dict[str, dict[str, Any]] = {
    f"c{number}": {"method": method.split("-")[0], **options}
    for number, (method, options) in enumerate(METHODS.items(), 1)
    if options.get("scope") != "sample"
} | {"c10": {"method": "qr_path", "rows": 8}, "c9": {"method": "mem_rec", "token_rows": 50, "hashes": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows, seed in (("train", 1500, 1), ("eval", 600, 2)):
        generate(str(folder / name), rows=rows, seed=seed, cardinalities=CARDINALITIES, dense=3)
        generate(str(folder / f"mixed-{name}"), rows=rows, seed=seed, cardinalities=(300,) * len(MIXED), dense=3)
    return folder


def trained(path: Path, folder: Path, model: str = "dlrm", **embedding: Any) -> str:
    """The checkpoint of a short run."""
    job = TrainingJob(
        data=DataConfig(path=str(path), batch_size=256),
        model=ModelConfig(name=model, bottom=[8], top=[8]),
        embedding=EmbeddingConfig(dim=4, **embedding),
        train=TrainConfig(threads=1),
    )
    with Store.open(blocks=20) as store:
        checkpoint: str = train(job, store, directory=str(folder))["checkpoint"]
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a method once and returns its checkpoint."""
    done: dict[str, str] = {}

    def of_method(method: str, model: str = "dlrm") -> str:
        if (key := f"{method}/{model}") not in done:
            options = {"method": method.split("-")[0], **METHODS[method]}
            done[key] = trained(data / "train", tmp_path_factory.mktemp("run"), model, **options)
        return done[key]

    return of_method


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(data / "mixed-train", tmp_path_factory.mktemp("run"), "dcn_v2", features=MIXED)


@pytest.mark.parametrize("method", METHODS)
def test_safetensors_answers_as_training(method: str, checkpoint: Any, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    result = export(checkpoint(method), str(output), data=str(data / "eval"))
    assert result["rows_compared"] == 600 and result["largest_difference"] <= 1e-5
    assert round(result["auc"], 4) == round(result["auc_in_training"], 4)
    assert result["file_bytes"] == output.stat().st_size
    assert result["latency_us"] > 0
    if method == "full":
        assert result["file_bytes"] == pytest.approx(result["full_file_bytes"], abs=2000)  # the descriptions differ
        assert result["embedding_bytes"] == result["full_embedding_bytes"] == 16 * sum(CARDINALITIES)
    elif method == "mlet":  # 16 floats per id in training, 4 in the file
        assert result["embedding_bytes"] == result["full_embedding_bytes"]
        _, tensors = export_lookup.open_export(str(output))
        assert tensors["table/c3.collapsed"].shape == (400, 4) and not any("factor" in name for name in tensors)
    else:
        assert result["embedding_bytes"] < result["full_embedding_bytes"]


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_a_feature_of_every_method_in_other_formats(format: str, mixed: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = export(mixed, str(output), format=format, data=str(data / "mixed-eval"))
    assert result["largest_difference"] <= 1e-5 and output.stat().st_size == result["file_bytes"]
    assert round(result["auc"], 4) == round(result["auc_in_training"], 4)
    assert {options["method"] for options in MIXED.values()} == set(planning.METHODS)


def test_one_vector_per_sample_in_another_format(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = export(checkpoint("mem_rec-sample", "dcn_v2"), str(output), format="torch", data=str(data / "eval"))
    assert result["largest_difference"] <= 1e-5 and output.stat().st_size == result["file_bytes"]
    assert round(result["auc"], 4) == round(result["auc_in_training"], 4)


def test_the_page_reads_the_file(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/export.md shows `export_lookup`, which agrees with the vectors of training; nothing of ours is imported."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    ours = Path(export_lookup.__file__).read_text()
    assert code.strip() == ours[ours.index("import json") :].strip().replace("  # noqa: SIM118", "")
    assert "embershard" not in re.sub(r'"embershard"|`embershard export`', "", code)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    output = str(tmp_path / "model.safetensors")
    export(checkpoint("qr"), output)
    described, tensors = namespace["open_export"](output)
    ids = {"c1": np.array([0, 6]), "c2": np.array([299, 3]), "c3": np.array([5, 5])}
    with open_network(checkpoint("qr")) as (network, _), torch.no_grad():
        expected = network.embeddings(ids).numpy()
    np.testing.assert_array_equal(namespace["lookup"](described, tensors, ids), expected)


MAPS = [
    RowMap("hash", 1000, seed=2**64 - 5),
    RowMap("index", 40, limit=40),
    RowMap("hash", 2**40 - 3, seed=77),
    RowMap("index", 13, divisor=7),
    RowMap("index", 13, divisor=7, limit=50, wrap=True),
    RowMap("hash", 50, seed=3, limit=40, wrap=True),
    RowMap("hash", 50, seed=3, limit=40),
]


def test_row_maps_equal_the_kernel_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**63), 2**63 - 1, (500, len(MAPS)))
    bounded = [i for i, m in enumerate(MAPS) if m.limit is not None and not m.wrap]
    ids[:, bounded] = rng.integers(0, 40, (500, len(bounded)))
    begins, rows = np.arange(len(MAPS) + 1) * 500, np.empty(ids.size, np.int64)
    kinds, seeds = np.array([m.code for m in MAPS], np.uint8), np.array([m.seed for m in MAPS], np.uint64)
    divisors, moduli, bounds = (np.array([getattr(m, n) for m in MAPS]) for n in ("divisor", "modulus", "bound"))
    values = np.ascontiguousarray(ids.T).ravel()
    assert kernels.map_ids(values, begins[:-1], begins[1:], kinds, seeds, divisors, moduli, bounds, begins, rows) == -1
    in_torch = RowMaps(list(enumerate(MAPS)))(torch.from_numpy(ids)).numpy()
    np.testing.assert_array_equal(in_torch.T.ravel(), rows)
    for i, m in enumerate(MAPS):
        described = {**m.__dict__, "seed": str(m.seed), "table": "t"}
        np.testing.assert_array_equal(export_lookup.rows_of(ids[:, i], described), in_torch[:, i])


@pytest.mark.parametrize("value", [-1, 40])
@pytest.mark.parametrize("row_map", [MAPS[1], MAPS[6]])
def test_an_id_outside_is_never_another_ids_row(value: int, row_map: RowMap) -> None:
    rows = RowMaps([(0, row_map)])(torch.tensor([[value]]))
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(rows[:, 0], torch.zeros(1000, 2))
    with pytest.raises(ValueError, match=r"t: ids must lie in \[0, 40\)"):
        export_lookup.rows_of(np.array([value]), {**row_map.__dict__, "seed": "0", "table": "t"})


def test_a_wrong_answer_is_not_exported(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {name: lambda *parts: np.add(*parts) + 1e-3 for name in export_lookup.OPERATIONS}
    monkeypatch.setattr(export_lookup, "OPERATIONS", wrong)
    with pytest.raises(ExportDiffers, match="answers differently"):
        export(checkpoint("memcom"), str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_or_has_no_folder(checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export(checkpoint("full"), str(tmp_path / "there"))
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(ExportError, match="there is no folder"):
        export(checkpoint("full"), str(tmp_path / "no" / "model"))


def test_a_checkpoint_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "step-000000001").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing; this is not a finished checkpoint"):
        export(str(tmp_path / "step-000000001"), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("compose", "operation"),
    [(lambda rows: torch.tanh(rows[0]), "tanh"), (lambda rows: torch.cat([rows[0], rows[0]], 0), "cat")],
)
def test_a_composition_without_a_word_in_the_layout(
    compose: Any, operation: str, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout joins along the width only."""
    monkeypatch.setattr(MEmCom, "compose", lambda self, rows: compose(rows))
    with pytest.raises(EmbeddingError, match=rf"'c2': method memcom composes with aten.*{operation}.* --format torch"):
        export(checkpoint("memcom"), str(tmp_path / "model"))


def test_onnx_has_limits(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_files, "ONNX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"holds 2 GB at most, this model has .* use --format safetensors"):
        export(checkpoint("full"), str(tmp_path / "model"), format="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed: pip install "embershard\[export\]"'):
        export(checkpoint("full"), str(tmp_path / "model"), format="onnx")


def test_a_bag_is_looked_up_id_by_id(tmp_path: Path) -> None:
    """safetensors takes bags, compared on random ids; a module with one id per feature cannot."""
    rng = np.random.default_rng(0)
    bags = [rng.integers(0, 50, rng.integers(0, 4)).tolist() for _ in range(300)]
    columns = {"label": rng.integers(0, 2, 300), "one": rng.integers(0, 9, 300), "many": bags}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    data = DataConfig(path=str(tmp_path / "data.parquet"), label="label", dense=[], categorical=["one"], bags=["many"])
    embedding = EmbeddingConfig(method="hash", rows=20, dim=4, pooling="mean")
    job = TrainingJob(data=data, model=ModelConfig(top=[8]), embedding=embedding, train=TrainConfig(threads=1))
    with Store.open(blocks=20) as store:
        checkpoint = train(job, store, directory=str(tmp_path / "run"))["checkpoint"]
    result = export(checkpoint, str(tmp_path / "model"), data=str(tmp_path / "data.parquet"))
    assert result["rows_compared"] > 0 and "auc" not in result
    described, tensors = export_lookup.open_export(str(tmp_path / "model"))
    assert [feature["pooling"] for feature in described["features"]] == ["mean", "mean"]
    with open_network(checkpoint) as (network, _), torch.no_grad():
        ids = {"one": np.array([3]), "many": (np.array([1, 5]), np.array([0, 2]))}
        expected = network.embeddings(ids).numpy()[0, 1]
    each = export_lookup.lookup(described, tensors, {"one": np.array([3, 3]), "many": np.array([1, 5])})
    np.testing.assert_allclose(each[:, 1].mean(0), expected, rtol=1e-6)
    with pytest.raises(ExportError, match="one id per feature, but feature 'many' is a bag: use --format safetensors"):
        export(checkpoint, str(tmp_path / "other"), format="torch")


def test_full_tables_that_are_too_large_are_not_built_to_be_timed(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "FULL_BYTES", 1000)
    assert export(checkpoint("hash"), str(tmp_path / "model"))["full_latency_us"] is None
