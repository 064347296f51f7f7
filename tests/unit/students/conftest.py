import os

import pytest
import torch
from student_world import make_model, make_stages, make_traces

from distill.dist import init_ranks
from distill.tokens import load_tokenizer

torch.set_num_threads(int(os.environ.get("DISTILL_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def ranks():
    return init_ranks("cpu")


@pytest.fixture(scope="session")
def aio():
    """What DeepSpeed reads and writes files with; compiled at its first use."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with model/ (a Qwen3 with a tied head) and run/ with 24 traces and their distributions."""
    root = tmp_path_factory.mktemp("world")
    make_model(root / "model")
    tokenizer = load_tokenizer(root / "model")
    make_stages(root, tokenizer, make_traces(tokenizer, 24))
    return root
