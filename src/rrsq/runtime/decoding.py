"""Decoding as CUDA graphs: a model's forward pass of one new token a sequence, captured once and replayed.

A decode step of an 8B model launches thousands of kernels that run for microseconds each; from Python that
takes ten times as long as they run. :class:`Decoder` stands in the place of a model's ``forward``. It gives a
cache of codes a :class:`~.kv_cache.static.Storage` that stays where it is, and where a forward pass is a
decode step on such a cache, it replays a graph of it. Everything else is the model's own forward pass:
several new tokens, other caches, gradients, adapters, autocast, hidden states, ``torch.compile``, and
prompts, of which :mod:`.prefill` makes graphs.

A graph knows nothing of what is changed later: modules that are not those of its capture are found when the
next cache begins, and their graphs thrown away. With hooks of somebody else nothing is captured.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..kernels import forced_backend
from .graphs import CapturedGraph, asks_for_more, can_capture, structure_of
from .kv_cache.attention import use_attention
from .kv_cache.paged import PagedBatching
from .kv_cache.quantizer import KVQuantizer
from .kv_cache.static import CodesLayer, Storage, enough
from .prefill import attach_prefill

__all__ = ["Decoder", "attach_decoder", "detach_decoder"]

logger = logging.getLogger(__name__)

_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
_FREE, _FREE_BYTES = 2, 2**30
"""Storages that are kept for the next cache, with their graphs: how many, and bytes of all together."""


def attach_decoder(model: Any) -> None:
    """Let a loaded model with a quantized KV cache decode from codes, where there are kernels for it."""
    quantizers = tuple(module for module in model.modules() if isinstance(module, KVQuantizer))
    if quantizers:
        use_attention(model.config.get_text_config())
        model.forward = Decoder(model, quantizers)
        model.init_continuous_batching = PagedBatching(model)
        attach_prefill(model)


def detach_decoder(model: Any) -> None:
    """Undo :func:`attach_decoder`: what follows is decoded by the model's own forward pass."""
    if isinstance(vars(model).get("forward"), Decoder):
        del model.forward


@dataclass
class _Graph:
    """A decode step with the tensors that it reads and writes."""

    graph: CapturedGraph
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    outputs: Any
    constants: object
    """Of the cache's quantizers: they are made anew where the model is moved or cast."""


class _Pool:
    """Storages that no cache uses at the moment."""

    def __init__(self) -> None:
        self._free: list[Storage] = []
        self._lock = threading.Lock()

    def take(
        self,
        quantizers: tuple[KVQuantizer, ...],
        windows: tuple[int | None, ...],
        batch: int,
        tokens: int,
        device: torch.device,
    ) -> Storage:
        with self._lock:
            fitting = [
                storage
                for storage in self._free
                if storage.windows == windows and storage.fits(batch, tokens, device)
            ]
            if fitting:
                best = min(fitting, key=lambda storage: storage.capacity)
                self._free.remove(best)
                return best
        return Storage(quantizers, windows, batch, enough(tokens), device)

    def give_back(self, storage: Storage) -> None:
        with self._lock:
            self._free.append(storage)
            while len(self._free) > _FREE or sum(each.nbytes for each in self._free) > _FREE_BYTES:
                del self._free[0]


class Decoder:
    """The forward pass of a model whose attention reads codes; see the module's documentation.

    Args:
        model: a causal language model of transformers, loaded.
        quantizers: of its KV cache, a layer each.
    """

    def __init__(self, model: nn.Module, quantizers: tuple[KVQuantizer, ...]) -> None:
        self.model = model
        self.quantizers = quantizers
        self._start()

    def _start(self) -> None:
        self._pool = _Pool()
        self._refused: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "quantizers": self.quantizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward pass, which ``generate()`` looks at."""
        signature = inspect.signature(type(self.model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        forward = type(self.model).forward
        cache = kwargs.get("past_key_values")
        if is_compiling() or not isinstance(cache, DynamicCache | StaticCache):
            return forward(self.model, *args, **kwargs)
        if args:
            kwargs = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        input_ids = kwargs.get("input_ids")
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        storage = None
        if isinstance(tokens, Tensor) and not torch.is_grad_enabled() and not self._is_spread():
            storage = self._storage(cache, tokens)
        if storage is None or not self._is_plain(storage, kwargs):
            return forward(self.model, **kwargs)
        if self._refused is None and self._is_step(cache, kwargs):
            return self._step(cache, storage, kwargs)
        storage.prompts = True
        try:
            return forward(self.model, **kwargs)
        finally:
            storage.prompts = False

    def _is_spread(self) -> bool:
        """Whether the model's layers are on several devices: each keeps its tokens where it is then."""
        return len(set(getattr(self.model, "hf_device_map", {}).values())) > 1

    def _storage(self, cache: Cache, tokens: Tensor) -> Storage | None:
        """The storage of a cache's layers, with room for the new tokens; None where they are no codes."""
        layers, device = cache.layers, tokens.device
        if not layers and cache.layer_class_to_replicate is not None:
            layers.extend(cache.layer_class_to_replicate() for _ in self.quantizers)
        if len(layers) != len(self.quantizers) or getattr(cache, "offloading", False):
            return None
        if not all(isinstance(layer, CodesLayer) for layer in layers) and not self._replace(layers, device):
            return None
        batch, needed = tokens.shape[0], layers[0].tokens + tokens.shape[1]
        storage = layers[0].storage
        shared = storage is not None and all(layer.storage is storage for layer in layers)
        if storage is not None and shared and storage.fits(batch, needed, device):
            return storage
        capacity = max(needed, layers[0].reserved)
        windows = tuple(layer.sliding_window for layer in layers)
        storage = self._pool.take(self.quantizers, windows, batch, capacity, device)
        structure = structure_of(self.model)
        if storage.structure != structure:
            storage.structure, storage.graphs = structure, {}
        for index, layer in enumerate(layers):
            layer.attach(storage, index)
        storage.used.fill_(layers[0].tokens)
        lender = getattr(cache, "_rrsq_lender", None)
        if lender is not None:
            lender()
        cache._rrsq_lender = weakref.finalize(cache, self._pool.give_back, storage)
        return storage

    def _replace(self, layers: list[Any], device: torch.device) -> bool:
        """Put layers of codes in the place of a new cache's; False where that cannot be."""
        reserved = max(getattr(layer, "max_cache_len", 0) for layer in layers)
        new: list[CodesLayer] = []
        for quantizer, layer in zip(self.quantizers, layers, strict=True):
            made = quantizer.quantized(layer, quantizer.reads_codes(device))
            if not isinstance(made, CodesLayer):
                return False
            made.reserved = reserved
            new.append(made)
        layers[:] = new
        return True

    def _is_plain(self, storage: Storage, kwargs: dict[str, Any]) -> bool:
        """Whether there is nothing in a forward pass that a graph would not know of."""
        return (
            storage.structure is not None
            and not self.model.training
            and not hasattr(self.model, "peft_config")
            and not torch.is_autocast_enabled(storage.device.type)
            and kwargs.get("use_cache") is not False
            and kwargs.get("return_dict") is not False
            and not asks_for_more(kwargs, _KNOWN)
        )

    def _is_step(self, cache: Cache, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass is one new token of each sequence."""
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        seen = cache.layers[0].tokens
        return (
            isinstance(input_ids, Tensor)
            and can_capture(input_ids.device)
            and input_ids.shape[1] == 1
            and seen > 0
            and (mask is None or (isinstance(mask, Tensor) and mask.shape == (input_ids.shape[0], seen + 1)))
        )

    def _step(self, cache: Cache, storage: Storage, kwargs: dict[str, Any]) -> Any:
        mask: Tensor | None = kwargs.get("attention_mask")
        keep = kwargs.get("logits_to_keep") or 0
        if isinstance(keep, Tensor):
            return type(self.model).forward(self.model, **kwargs)
        key = (mask is not None, keep, forced_backend())
        constants = self.quantizers[0].constants(storage.device)
        found = storage.graphs.get(key)
        if isinstance(found, _Graph) and found.constants is not constants:
            found = None
        if found is None:
            # The first step runs as it is, which compiles what there is to compile; the second is captured.
            storage.graphs[key] = "warm"
            return type(self.model).forward(self.model, **kwargs)
        if found == "warm":
            made = self._capture(cache, storage, kwargs)
            if made is None:
                return type(self.model).forward(self.model, **kwargs)
            found = storage.graphs[key] = made
        layers: list[Any] = cache.layers
        seen = layers[0].tokens
        found.input_ids.copy_(kwargs["input_ids"])
        positions = kwargs.get("position_ids")
        if positions is None:
            found.position_ids.fill_(seen)
        else:
            found.position_ids.copy_(positions)
        if mask is not None:
            found.mask[:, 0, 0, : mask.shape[1]].copy_(mask)
        found.graph.replay()
        for layer in layers:
            layer.tokens += 1
        return type(found.outputs)(logits=found.outputs.logits.clone(), past_key_values=cache)

    def _capture(self, cache: Cache, storage: Storage, kwargs: dict[str, Any]) -> _Graph | None:
        """A graph of a decode step; None, and no graphs from now on, where the model cannot be captured."""
        layers: list[Any] = cache.layers
        seen = layers[0].tokens
        # With a mask of four dimensions transformers makes none of its own, which would be that of one
        # length: attention is causal and windowed by itself, and sees what lies beyond the last column.
        columns = storage.capacity if kwargs.get("attention_mask") is not None else 1
        with torch.inference_mode(False):  # See CapturedGraph.
            input_ids = kwargs["input_ids"].clone()
            positions = torch.full_like(input_ids, seen)
            mask = torch.ones((storage.batch, 1, 1, columns), dtype=torch.bool, device=storage.device)
        given = {
            **kwargs,
            "input_ids": input_ids,
            "position_ids": positions,
            "attention_mask": mask,
            "use_cache": True,
            "return_dict": True,
        }

        def run() -> Any:
            outputs = type(self.model).forward(self.model, **given)
            storage.used.add_(1)
            # Not the cache: the graph would keep it, and it this storage, which nobody else got then.
            kept = {name: value for name, value in outputs.items() if not isinstance(value, Cache)}
            return type(outputs)(**kept)

        storage.together = True
        try:
            graph = CapturedGraph(run)
        except RuntimeError as error:
            self._refused = str(error).splitlines()[0]
            logger.warning(
                "Decoding is not captured as a CUDA graph and stays slow: %s. What it gives is the same.",
                self._refused,
            )
            return None
        finally:
            storage.together = False
            for layer in layers:
                layer.tokens = seen
        outputs = graph.result
        if set(outputs) != {"logits"}:  # Hidden states, say, that the configuration asks for.
            self._refused = f"the forward pass gives {', '.join(sorted(outputs))}"
            return None
        constants = self.quantizers[0].constants(storage.device)
        return _Graph(graph, input_ids, positions, mask, outputs, constants)
