"""The quantization method ``rrsq`` as vLLM configures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from ..models import ModelFamily, family_for
from ..runtime.format.format import QUANT_METHOD, CheckpointInfo, parse_info
from ..runtime.format.json_files import read_config
from ..runtime.format.shards import has_shards
from ..runtime.format.validate import check_description, check_layers
from ..runtime.kv_cache.quantizer import KVQuantizer
from ..runtime.scheme import head_is_kept, head_shares_codes
from .cache import CacheMethod, has_quantized_cache
from .experts import RRSQExpertsMethod
from .head import HeadMethod
from .limits import check_servable
from .linear import RRSQLinearMethod
from .models import served_architecture
from .places import Places

__all__ = ["RRSQConfig", "register_quantization"]


class RRSQConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint, and which layer of vLLM's model is quantized how.

    Attributes:
        info: the validated configuration.
        rotations: of the model.
        family, places: of the model; known once vLLM has shown its configuration, as is
        shares_codes: whether the output head has the codes of the embedding.
        quantizers: of the KV cache, by layer; empty where vLLM keeps it in its own way. Known once the model
            is built, as are
        cached_layers: vLLM's attentions that have one, by layer, of this process.
    """

    family: ModelFamily
    places: Places
    shares_codes: bool

    def __init__(self, info: CheckpointInfo) -> None:
        super().__init__()
        self.info = info
        self.rotations = info.rotation.rotations()
        self.quantizers: dict[int, KVQuantizer] = {}
        self.cached_layers: dict[int, nn.Module] = {}

    def get_name(self) -> Any:
        """The method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What is not quantized may be of any of these."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: that of the kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RRSQConfig:
        """From a checkpoint's ``quantization_config``.

        Raises:
            CheckpointError: it is not valid, or of another format version.
        """
        return cls(parse_info(dict(config)))

    def maybe_update_config(
        self, model_name: str, hf_config: Any | None = None, revision: str | None = None
    ) -> None:
        """Check the checkpoint when the engine starts, and have its model built by :mod:`.models`.

        Raises:
            CheckpointError: the parts of its configuration do not go together.
            UnsupportedArchitectureError: no family is known for the model.
            UsageError: it cannot be served.
        """
        assert hf_config is not None, "vLLM did not say which model this is"
        self.family = family_for(hf_config)
        check_description(hf_config, self.info)
        check_servable(hf_config, self.info)
        folder = Path(model_name)
        if folder.is_dir():
            read_config(folder)
            if has_shards(folder):  # vLLM can make weights up (--load-format dummy).
                check_layers(folder, hf_config.get_text_config().num_hidden_layers)
        self.places = Places(self.family, self.info.recipe)
        self.shares_codes = head_shares_codes(self.info.recipe, self.family, hf_config)
        hf_config.architectures = [served_architecture(self.family.architecture)]

    @property
    def fused_linears(self) -> dict[str, list[str]]:
        """The linears of a checkpoint that one of vLLM's is made of, by its name.

        What models of vLLM say of it is not always complete; then it is what all of them do.
        """
        usual = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        return {**usual, **self.packed_modules_mapping}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take over how vLLM's model names what a checkpoint has."""
        self.places.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of vLLM's model is quantized; None for vLLM's own way."""
        if isinstance(layer, LinearBase):
            place = self.places.linear(prefix, self.fused_linears)
            if place is None or not any(place.quantized):
                return UnquantizedLinearMethod()
            return RRSQLinearMethod(place, self.rotations)
        if isinstance(layer, RoutedExperts):
            places = self.places.experts(prefix)
            quantized = bool(places) and all(all(place.quantized) for place in places.values())
            return RRSQExpertsMethod(layer.moe_config, places, self.rotations) if quantized else None
        if isinstance(layer, ParallelLMHead):
            own = not self.shares_codes and not head_is_kept(self.info.recipe, self.family)
            return HeadMethod(self.info.recipe) if own else None
        return CacheMethod(self, prefix) if has_quantized_cache(layer) else None


def register_quantization() -> None:
    """Make vLLM find :class:`RRSQConfig` by the name that stands in a checkpoint."""
    register_quantization_config(QUANT_METHOD)(RRSQConfig)
