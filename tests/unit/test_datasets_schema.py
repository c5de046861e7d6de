"""Batches, schemas and the data settings."""

import numpy as np
import pytest
import torch
from embershard.datasets.schema import CategoricalColumn, DataConfig, DenseColumn, Ids, Schema
from pydantic import ValidationError


def test_ids_of_one_per_sample_are_views_by_feature():
    ids = Ids(("a", "b"), np.arange(6))
    values, offsets = ids["b"]
    assert values.tolist() == [3, 4, 5]
    assert offsets is None
    assert np.shares_memory(values, ids.values)
    assert ids.batch_size == 3
    with pytest.raises(KeyError, match="no feature 'c': the batch holds a, b"):
        ids["c"]


def test_from_dict_takes_arrays_and_tensors_and_mixes_bags_with_plain_ids():
    ids = Ids.from_dict({"a": torch.tensor([7, 8]), "b": (np.array([1, 2, 3], np.int32), np.array([0, 0, 3]))})
    assert ids.values.dtype == np.int64
    assert ids.offsets.tolist() == [0, 1, 2, 2, 5]
    values, offsets = ids["b"]
    assert values.tolist() == [1, 2, 3]
    assert offsets.tolist() == [0, 0, 3]
    assert ids["a"][0].tolist() == [7, 8]
    assert ids["a"][1].tolist() == [0, 1, 2]


def test_from_dict_of_plain_ids_has_no_offsets():
    assert Ids.from_dict({"a": [1, 2], "b": [3, 4]}).offsets is None
    assert Ids.from_dict({}).batch_size == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": [1], "b": [1, 2]}, "same number of samples, these have a 1, b 2"),
        ({"a": [1.5]}, r"ids\['a'\]: expected integers"),
        ({"a": ([1, 2], [0, 1])}, r"ids\['a'\]: offsets must be \[B \+ 1\]"),
        ({"a": ([1, 2], [0, 2, 1, 2])}, r"ids\['a'\]: offsets must be"),
    ],
)
def test_from_dict_names_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        Ids.from_dict(given)


def test_schema_survives_json_and_lists_columns_in_order():
    schema = Schema(
        source="criteo",
        label="label",
        dense=[DenseColumn(name="i1", missing=0.5)],
        categorical=[CategoricalColumn(name="c1", distinct=3, cardinality=4)],
        rows=10,
    )
    assert Schema.model_validate_json(schema.model_dump_json()) == schema
    assert schema.columns == ["label", "i1", "c1"]


def test_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="batchsize"):
        DataConfig(batchsize=3)
