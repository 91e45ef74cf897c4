"""A small architecture that transformers does not know, registered with both libraries from outside.

Attention and MLP run side by side on one LayerNorm, a gate for each token weighs their sum, projections are
fused, positions are learned, and layers return tuples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rrsq.models import LAYER_NORM, LinearInput, ModelFamily

TOY = ModelFamily(
    "toy",
    "ToyForCausalLM",
    (
        LinearInput("qkv", "mixer", ("fused",), norm="norm", full_precision=("gate",)),
        LinearInput("o", "mixer", ("project",)),
        LinearInput("gate_up", "", ("grow",), norm="norm"),
        LinearInput("down", "", ("shrink",)),
    ),
    norm=LAYER_NORM,
    embedding="trunk.words",
    positions="trunk.places",
    layers="trunk.blocks",
    final_norm="trunk.norm",
    head="out",
    rotary=None,
    attention="mixer",
    value="fused",
    intermediate_size="ffn_size",
)


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(
        self, vocab_size: int = 512, hidden_size: int = 36, ffn_size: int = 56, **kwargs: Any
    ) -> None:
        self.vocab_size, self.hidden_size, self.ffn_size = vocab_size, hidden_size, ffn_size
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 2, 4, 2
        self.head_dim = 12
        kwargs = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, **kwargs}
        super().__init__(**kwargs)


class ToyMixer(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.fused = nn.Linear(config.hidden_size, 8 * 12)
        self.project = nn.Linear(4 * 12, config.hidden_size)

    def forward(self, x: Tensor, past_key_values: Any = None, position_ids: Tensor | None = None) -> Tensor:
        q, k, v = self.fused(x).unflatten(-1, (8, 12)).transpose(1, 2).split((4, 2, 2), dim=1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.project(y.transpose(1, 2).flatten(2))


class ToyBlock(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, 1)
        self.mixer = ToyMixer(config, layer_idx)
        self.grow = nn.Linear(config.hidden_size, config.ffn_size)
        self.shrink = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor, past_key_values: Any, position_ids: Tensor) -> tuple[Tensor]:
        n = self.norm(x)
        mixed = self.mixer(n, past_key_values=past_key_values, position_ids=position_ids)
        return (x + self.gate(n).sigmoid() * (mixed + self.shrink(torch.tanh(self.grow(n)))),)


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True


class ToyTrunk(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(64, config.hidden_size)
        self.blocks = nn.ModuleList(ToyBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(start, start + x.shape[1]).unsqueeze(0)
        x = x + self.places(position_ids)
        for block in self.blocks:
            x = block(x, past_key_values, position_ids)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class ToyForCausalLM(ToyPreTrainedModel, GenerationMixin):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.trunk = ToyTrunk(config)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        outputs = self.trunk(input_ids, **kwargs)
        return CausalLMOutputWithPast(
            logits=self.out(outputs.last_hidden_state), past_key_values=outputs.past_key_values
        )


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
