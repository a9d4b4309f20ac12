"""The values that the C++ tests compare with are those that the oracles compute today."""

import pytest
import torch
import write_oracle_values
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle_values")
    write_oracle_values.write(folder)
    return folder


def test_there_is_no_other_file(written):
    assert {p.name for p in written.iterdir()} == {p.name for p in write_oracle_values.FOLDER.iterdir()}


@pytest.mark.parametrize("name", [make.__name__ for make in write_oracle_values.FILES])
def test_the_file_is_what_the_oracles_compute(name, written):
    kept, new = (load_file(f / f"{name}.safetensors") for f in (write_oracle_values.FOLDER, written))
    assert kept.keys() == new.keys()
    for key, value in kept.items():
        # float64 holds sums and exponentials, whose last bits another CPU may compute otherwise.
        rtol, atol = (1e-13, 1e-15) if value.dtype == torch.float64 else (0, 0)
        torch.testing.assert_close(
            new[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )
