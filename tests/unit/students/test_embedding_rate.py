"""Embedding and head learn at their own rate when the config says so."""

import torch

from distill.config import Train
from students.optim import parameter_groups


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(5, 4)
        self.proj = torch.nn.Linear(4, 4)


def test_embedding_has_its_own_group_with_the_ratio_and_no_weight_is_in_two_groups():
    module = Tied()
    groups = parameter_groups(module, Train(embedding_lr_ratio=0.1))
    ratios = {id(p): group.get("lr_ratio", 1.0) for group in groups for p in group["params"]}
    assert ratios == {id(module.embed_tokens.weight): 0.1, id(module.proj.weight): 1.0, id(module.proj.bias): 1.0}


def test_ratio_of_one_keeps_the_two_groups_of_matrices_and_vectors():
    sizes = [len(group["params"]) for group in parameter_groups(Tied(), Train())]
    assert sizes == [2, 1]
