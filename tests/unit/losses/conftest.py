import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Two threads are plenty at these sizes; LOSS_TEST_SEED=n draws other inputs than the usual ones."""
    torch.set_num_threads(2)
    torch.manual_seed(int(os.environ.get("LOSS_TEST_SEED", "0")))
