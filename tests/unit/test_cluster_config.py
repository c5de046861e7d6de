"""The configuration of a run: every room's section, the saved form, and the files in deploy/."""

from pathlib import Path

import pytest
from embershard.cluster.config import RunConfig
from embershard.cluster.errors import ConfigError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})


def test_saved_configuration_reads_back(tmp_path: Path) -> None:
    """Also from another folder: local paths are absolute by then, URLs as they were."""
    config = RunConfig.load(
        None, "data.path=x/train", "data.eval_path=s3://bucket/eval", "embedding.features.c1.rows=9"
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    again = RunConfig.load(saved)
    assert again.data.path == str(Path("x/train").resolve())
    assert again.data.eval_path == "s3://bucket/eval"
    assert again.run_dir == config.run_dir
    assert again.embedding.features["c1"].rows == 9
    assert again.to_yaml() == config.to_yaml()


def test_defaults_fit_a_laptop_with_two_cores() -> None:
    cluster = RunConfig.load().cluster
    assert cluster.shards * cluster.shard_cpus + 2 * cluster.worker_cpus <= 2
    assert (cluster.shards, cluster.workers, cluster.address) == (2, 1, None)


def test_default_folder_is_named_by_date_and_stays_the_same() -> None:
    config = RunConfig.load(None, "run.name=kaggle")
    assert config.run_dir == config.run_dir
    assert config.run_dir.parent == Path("runs").resolve()
    assert config.run_dir.name.endswith("-kaggle")


def test_the_job_has_every_section_that_workers_need() -> None:
    job = RunConfig.load(None, "train.epochs=3", "optimizer.sparse.kind=sgd", "seed=7", "data.path=d").job()
    assert (job.train.epochs, job.optimizer.sparse.kind, job.seed) == (3, "sgd", 7)
    assert job.data.path == str(Path("d").resolve())


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("train.epoch=1", "did you mean 'train.epochs'"),
        ("cluster.shard=1", "did you mean 'cluster.shards'"),
        ("embeding.dim=8", "did you mean 'embedding'"),
        ("batch_size=8", "did you mean 'data.batch_size'"),
        ("embedding.features.c1.row=8", "did you mean 'embedding.features.c1.rows'"),
        ("optimizer.sparse.kind=adamw", "optimizer.sparse.kind"),
        ("cluster.gpus=maybe", "cluster.gpus"),
        ("optimizer.sparse.learning_rate=inf", "optimizer.sparse.learning_rate: Input should be a finite number"),
        ("optimizer.dense.learning_rate=inf", "optimizer.dense.learning_rate: Input should be a finite number"),
        ("seed=-1", "seed"),
    ],
)
def test_errors(argument: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RunConfig.load(None, argument)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.name)
def test_deployed_configurations_load(file: Path) -> None:
    assert RunConfig.load(file).model.name == "dlrm"


def test_terabyte_cardinalities_are_mlperfs() -> None:
    features = RunConfig.load(DEPLOY / "criteo-terabyte.yaml").embedding.features
    cardinalities = [features[f"c{i}"].cardinality for i in range(1, 27)]
    assert sum(filter(None, cardinalities)) * 128 == 24_034_227_072
