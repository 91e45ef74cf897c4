"""vLLM's models as checkpoints need them.

Each family is served by a subclass of vLLM's own model, which is chosen for checkpoints only: it checks what
its process can hold, loads with :mod:`.loading`, and has what rotation brings about and vLLM's model lacks (a
head of its own, a norm that does not centre).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import maybe_prefix

from ..models import families
from ..runtime.modules.norms import replace_final_norm, replace_layer_norms
from ..runtime.scheme import embedding_is_kept
from .cache import quantized_cache
from .fusion import fuse
from .head import quantize_embedding
from .limits import check_servable
from .loading import described_model, expected_tensors, load_checkpoint

__all__ = ["register_models", "served_architecture"]

_PREFIX = "RRSQ"
_Model: Any = object  # What comes after these classes is a model of vLLM's.


def served_architecture(architecture: str) -> str:
    """The name under which vLLM knows the model that serves checkpoints of an architecture."""
    return _PREFIX + architecture


def register_models() -> None:
    """Make vLLM know the models of all families; they are imported when one is built."""
    for family in families():
        name = served_architecture(family.architecture)
        if family.architecture in ModelRegistry.models and name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type[Any]:
    architecture = name.removeprefix(_PREFIX)
    if name == architecture or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _served(name, ModelRegistry.models[architecture].load_model_cls())
    globals()[name] = made
    return made


def _served(name: str, base: Any) -> type[Any]:
    """A subclass of one of vLLM's models for checkpoints."""
    return type(name, (_SPECIAL.get(base.__name__, _Served), base), {"__module__": __name__})


class _Served(_Model):
    """Checks and loads a checkpoint; stands before one of vLLM's models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        parallel, hf_config = vllm_config.parallel_config, vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        check_servable(hf_config, quant_config.info, parallel.tensor_parallel_size)
        # Before vLLM, where it has no model of its own, changes that of transformers.
        described = described_model(hf_config, quant_config.info)
        with quantized_cache(vllm_config, quant_config.family, described) as quantizers:
            quant_config.quantizers = quantizers
            self._build(vllm_config, prefix)
        if not embedding_is_kept(quant_config.info.recipe, quant_config.family):
            quantize_embedding(self, quant_config.places, shared=quant_config.shares_codes)
        fuse(self.get_submodule(quant_config.places.layers), vllm_config)
        self._checkpoint = (quant_config, expected_tensors(described))

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all of a checkpoint's tensors; see :func:`.loading.load_checkpoint`."""
        return load_checkpoint(self, *self._checkpoint, weights, super().load_weights)


class _OwnHead(_Served):
    """Gemma: R1 makes the output head another matrix than the embedding, which vLLM takes it to be."""

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        tied, config.tie_word_embeddings = config.tie_word_embeddings, True
        try:
            super()._build(vllm_config, prefix)
        finally:
            config.tie_word_embeddings = tied
        self._tied = tied
        if not tied:
            self.lm_head = _head(config.hidden_size, vllm_config, prefix)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[tokens, hidden]`` to logits."""
        head = self.model.embed_tokens if self._tied else self.lm_head
        return self.logits_processor(head, hidden_states)


class _NoCentring(_Served):
    """OPT: R1 leaves an RMSNorm of each LayerNorm, and gives the output head a bias."""

    def _build(self, vllm_config: VllmConfig, prefix: str) -> None:
        super()._build(vllm_config, prefix)
        quant_config = vllm_config.quant_config
        family, rotations = quant_config.family, quant_config.rotations
        self._tied = self.config.tie_word_embeddings
        if not self._tied:
            bias = rotations.residual is not None
            self.lm_head = _head(self.config.hidden_size, vllm_config, prefix, bias=bias)
        for layer in self.model.decoder.layers[self.model.decoder.start_layer : self.model.decoder.end_layer]:
            replace_layer_norms(layer, family, rotations)
        replace_final_norm(self, family, rotations)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[tokens, hidden]`` to logits."""
        bias = None if self._tied else self.lm_head.bias
        return self.logits_processor(self.lm_head, hidden_states, bias)


def _head(hidden: int, vllm_config: VllmConfig, prefix: str, *, bias: bool = False) -> ParallelLMHead:
    config = vllm_config.model_config.hf_config
    return ParallelLMHead(
        config.vocab_size,
        hidden,
        bias=bias,
        quant_config=vllm_config.quant_config,
        prefix=maybe_prefix(prefix, "lm_head"),
    )


_SPECIAL: dict[str, type[_Served]] = {
    "GemmaForCausalLM": _OwnHead,
    "Gemma2ForCausalLM": _OwnHead,
    "OPTForCausalLM": _NoCentring,
}
