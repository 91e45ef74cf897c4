"""The embedding in 8 or 4 bits: each row by itself, rounded to nearest.

What is looked up is a row and nothing is summed over rows, so there is no error of one that another could
take up, as GPTQ has it among the channels of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models import ModelFamily
from ..recipe import Recipe
from ..runtime.assemble import quantize_embedding_module
from ..runtime.modules.embedding import Int8Embedding
from ..runtime.modules.int8_linear import PIECE, round_rows
from .grid import choose_grid, round_to_grid

__all__ = ["quantize_embedding"]


def quantize_embedding(model: nn.Module, family: ModelFamily, recipe: Recipe, device: torch.device) -> None:
    """Quantize the embedding, which is rotated if it is to be, as the recipe says; in place.

    Args:
        model: its embedding has its weights, on the CPU.
        family: where its parts are.
        recipe: ``embedding``.
        device: where to compute.

    Raises:
        RecipeError: the embedding is of a kind that cannot be quantized.
    """
    original: Any = model.get_submodule(family.embedding)
    new: Any = quantize_embedding_module(model, family, recipe)
    if new is None:
        return
    weight = original.weight.detach()
    count = max(1, PIECE // new.embedding_dim)
    for first in range(0, new.num_embeddings, count):
        rows = slice(first, first + count)
        piece = weight[rows].to(device, torch.float32)
        if isinstance(new, Int8Embedding):
            new.set_rows(rows, *round_rows(piece))
            continue
        if new.rotation is not None:
            piece = new.rotation(piece)
        grid = choose_grid(piece, new.group_size, signed=True)
        codes = round_to_grid(piece, grid.steps(new.embedding_dim))
        new.set_weight(codes, grid.scale, grid.multiplier, (rows,))
