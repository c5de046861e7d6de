"""Settings from file, environment and command line: precedence, and errors that name the key and the place."""

from pathlib import Path

import pytest
from embershard.cluster.errors import ConfigError
from embershard.cluster.settings import resolve
from pydantic import BaseModel, ConfigDict, Field


class Override(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: int | None = None


class Train(BaseModel):
    model_config = ConfigDict(extra="forbid")
    epochs: int = Field(1, gt=0)
    rate: float = 0.1
    path: str | None = None
    layers: list[int] = [8, 4]
    features: dict[str, Override] = {}


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    train: Train = Train()
    seed: int = 0


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {epochs: 2, rate: 1e-3, layers: [1, 2, 3]}\nseed: 1\n")
    config = resolve(
        Config, file, {"EMBERSHARD_TRAIN__EPOCHS": "3", "EMBERSHARD_SEED": "2", "PATH": "/bin"}, ["seed=5"]
    )
    assert (config.train.epochs, config.seed, config.train.layers) == (3, 5, [1, 2, 3])
    assert config.train.rate == 1e-3  # YAML 1.1 reads 1e-3 as a string


def test_a_token_is_no_setting() -> None:
    environment = {"EMBERSHARD_TOKEN": "0123456789abcdef", "EMBERSHARD_TOKEN_FILE": "/run/secrets/token"}
    assert resolve(Config, None, environment, []) == Config()


def test_values_are_yaml_scalars() -> None:
    config = resolve(Config, None, {}, ["train.path=null", "train.layers=[3, 2]", "train.rate=1e-2", "train.path=a=b"])
    assert config.train.model_dump(include={"path", "layers", "rate"}) == {
        "path": "a=b",
        "layers": [3, 2],
        "rate": 0.01,
    }


def test_names_that_users_chose_keep_their_case() -> None:
    environment = {"EMBERSHARD_TRAIN__FEATURES__C1x__ROWS": "7"}
    assert resolve(Config, None, environment, ["train.features.User.rows=9"]).train.features == {
        "C1x": Override(rows=7),
        "User": Override(rows=9),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.epocs=2"], "did you mean 'train.epochs'"),
        (["trian.epochs=2"], "did you mean 'train'"),
        (["epochs=2"], "did you mean 'train.epochs'"),
        (["train.zzzz=2"], "train takes epochs, rate"),
        (["train.features.a.row=2"], "did you mean 'train.features.a.rows'"),
        (["seed.x=2"], "seed is a value, not a section"),
        (["train.epochs=many"], "command line: train.epochs: Input should be a valid integer"),
        (["train.epochs=0"], "train.epochs: Input should be greater than 0, got 0"),
        (["train.layers=[1, x]"], "train.layers"),
        (["train=3"], "train"),
        (["train.epochs"], "expected key=value"),
        (["train.path=[1"], "not a YAML value"),
    ],
)
def test_errors_name_the_key(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Config, None, {}, arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key 'train\.epoch'; did you mean 'train\.epochs'\?"):
        resolve(Config, write(tmp_path, "train:\n  epoch: 1\n"), {}, [])
    with pytest.raises(ConfigError, match=r"environment EMBERSHARD_TRAIN__EPOCHS: train\.epochs: .*integer"):
        resolve(Config, None, {"EMBERSHARD_TRAIN__EPOCHS": "x"}, [])
    with pytest.raises(ConfigError, match="unknown key 'nothing'"):
        resolve(Config, None, {"EMBERSHARD_NOTHING": "x"}, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: [", "line 1"),
        ("- a", "expected sections"),
        ("train:\n  epochs: [1", "not YAML"),
        ("1: 2", "expected sections"),
    ],
)
def test_files_that_are_not_configurations(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(Config, write(tmp_path, text), {}, [])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run or configuration file"):
        resolve(Config, tmp_path / "absent.yaml", {}, [])


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    assert resolve(Config, write(tmp_path, "train:\nseed: 4\n"), {}, []) == Config(seed=4)
