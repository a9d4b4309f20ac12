import os

import pytest
import torch

ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["cpu", *(ON_GPU if torch.cuda.is_available() else [])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def data_dir():
    """The folder with `mnist` and `fashion-mnist`, where TORCHQAT_DATA names one."""
    path = os.environ.get("TORCHQAT_DATA")
    if not path:
        pytest.skip("TORCHQAT_DATA is not set: no MNIST to read")
    return path


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
