"""Prompts as CUDA graphs: the forward pass of a model without its head, for prompts of about one length.

Up to some thousands of tokens the kernels of a prompt take less time than Python takes to launch them.
:class:`Prefill` stands in the place of the ``forward`` of the module below the head. Prompts are padded at
their end to one of a few lengths: attention is causal, and all else is of one token, so nothing that is asked
for changes but last bits, where a product rounds by the number of tokens (16-bit activations). What a cache
holds beyond its tokens is overwritten by the next ones. The second prompt of a length in a
:class:`~.kv_cache.static.Storage` is captured. Head, loss and what else a family does behind its layers are
its own forward pass.

All graphs work in the same memory, that of the longest prompt among them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, StaticCache

from ..kernels import forced_backend
from ..kernels.cache_attend import QUERIES
from .graphs import CapturedGraph, GraphPool, asks_for_more, can_capture
from .kv_cache.static import CodesLayer, Storage
from .modules.input import InputQuantizer

__all__ = ["MOST_TOKENS", "Prefill", "attach_prefill", "padded_length"]

logger = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Of prompts that are captured, all sequences together, with padding: the GPU is busy with longer ones."""
_GRAPHS = 32
"""Graphs of a model: as many as there are lengths of one prompt."""
_KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}


def attach_prefill(model: Any) -> None:
    """Let a causal language model process prompts as graphs, unless tokens share scales with padding."""
    if all(_quantizes_by_token(module) for module in model.modules()):
        # A model of images and text makes its masks above its decoder.
        text = model.config.get_text_config() is model.config
        module = model.get_decoder() if text else model.base_model
        if module is not model:
            module.forward = Prefill(module)


def _quantizes_by_token(module: nn.Module) -> bool:
    if not isinstance(module, InputQuantizer):
        return True
    scheme = module.scheme
    if scheme.bits == 16 or scheme.group_size is None:
        return True
    return scheme.scope == "token" and not scheme.simulated


def padded_length(tokens: int) -> int:
    """The length that a prompt of ``tokens`` is padded to.

    Above 512 tokens an eighth is added at most. Below, reading the weights takes most of the time, and there
    is hardly less to do for fewer tokens. Up to :data:`~rrsq.kernels.cache_attend.QUERIES` tokens attention
    reads codes, by another kernel.
    """
    if tokens <= QUERIES:
        return QUERIES
    step = 64 if tokens <= 1024 else 128 if tokens <= 2048 else 256
    return -(-tokens // step) * step


@dataclass
class _Prompt:
    """A captured prompt with the tensors that it reads and writes."""

    graph: CapturedGraph
    input_ids: Tensor
    position_ids: Tensor
    hidden: Tensor
    kind: type
    """Of what the forward pass returns."""
    dtype: torch.dtype
    """Of keys."""
    constants: object
    """Of the cache's quantizers: they are made anew where the model is moved or cast."""


class _Graphs:
    """The graphs of one model's prompts.

    Of a pool the first graph is the largest: smaller ones find room in what it allocated. It is kept as long
    as the pool, since a pool without a graph cannot be used again.

    Attributes:
        used: the storages and keys of graphs, and of prompts of which the next is captured, the latest last.
        refused: why nothing is captured any more.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.used: OrderedDict[tuple[int, Any], weakref.ref[Storage]] = OrderedDict()
        self.pool: GraphPool | None = None
        self.largest: _Prompt | None = None
        self.refused: str | None = None

    def find(self, storage: Storage, key: Any) -> Any:
        """What is known of a prompt: a :class:`_Prompt`, ``"warm"``, or None."""
        place = id(storage), key
        if key in storage.graphs and place in self.used:
            self.used.move_to_end(place)
            return storage.graphs[key]
        return None

    def put(self, storage: Storage, key: Any, value: Any) -> None:
        """Remember it, and forget what was not used for longest."""
        storage.graphs[key] = value
        self.used[id(storage), key] = weakref.ref(storage)
        self.used.move_to_end((id(storage), key))
        while len(self.used) > _GRAPHS:
            (_, old), owner = self.used.popitem(last=False)
            _drop(owner(), old)

    def clear(self) -> None:
        """Forget all graphs and their memory."""
        for (_, key), owner in self.used.items():
            _drop(owner(), key)
        self.used.clear()
        self.pool = self.largest = None

    def pool_for(self, tokens: int) -> GraphPool:
        """The pool for a graph of so many tokens."""
        if self.pool is None or (self.largest is not None and self.largest.input_ids.numel() < tokens):
            self.clear()
            self.pool = GraphPool()
        return self.pool


def _drop(storage: Storage | None, key: Any) -> None:
    if storage is not None:
        storage.graphs.pop(key, None)


class Prefill:
    """The forward pass of the module below a model's head; see the module's documentation.

    It is for prompts that a :class:`~.decoding.Decoder` lets through (``Storage.prompts``), which sees what
    is above this module.

    Args:
        module: from token ids to hidden states, of transformers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphs = _Graphs()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self._graphs = _Graphs()

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward pass."""
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        forward = type(self.module).forward
        cache = kwargs.get("past_key_values")
        if args or is_compiling() or not isinstance(cache, DynamicCache | StaticCache):
            return forward(self.module, *args, **kwargs)
        layers: list[Any] = cache.layers
        storage = layers[0].storage if layers and isinstance(layers[0], CodesLayer) else None
        if storage is None or not storage.prompts or not self._is_prompt(layers[0].tokens, storage, kwargs):
            return forward(self.module, **kwargs)
        with self._graphs.lock:
            return self._run(cache, storage, kwargs)

    def _is_prompt(self, seen: int, storage: Storage, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass is of prompts without padding on an empty cache, and nothing else."""
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        if seen or self._graphs.refused is not None or not isinstance(input_ids, Tensor):
            return False
        batch, tokens = input_ids.shape
        length = padded_length(tokens)
        return (
            can_capture(input_ids.device)
            and tokens > 0
            and kwargs.get("use_cache") is not False
            and kwargs.get("return_dict") is not False
            and batch * length <= MOST_TOKENS
            and length <= storage.capacity
            and (positions is None or positions.shape in ((1, tokens), (batch, tokens)))
            and not asks_for_more(kwargs, _KNOWN)
            and (mask is None or _is_full(mask, input_ids))
        )

    def _run(self, cache: Any, storage: Storage, kwargs: dict[str, Any]) -> Any:
        graphs, input_ids = self._graphs, kwargs["input_ids"]
        tokens = input_ids.shape[1]
        length = padded_length(tokens)
        key = "prompt", length, kwargs.get("use_cache"), forced_backend()
        constants = cache.layers[0].quantizer.constants(storage.device)
        found = graphs.find(storage, key)
        if isinstance(found, _Prompt) and found.constants is not constants:
            graphs.clear()
            found = None
        ids = pad(input_ids, (0, length - tokens))
        positions = _positions(kwargs.get("position_ids"), ids, tokens)
        if found is None:
            # The first runs as a graph of it would, which compiles what there is to compile.
            outputs, dtype = self._padded(cache, storage, kwargs, ids, positions)
            if set(outputs) - {"last_hidden_state", "past_key_values"}:
                # All hidden states, say, that the configuration asks for.
                graphs.refused = f"the forward pass gives {', '.join(sorted(outputs))}"
                return type(self.module).forward(self.module, **kwargs)
            graphs.put(storage, key, "warm")
            hidden, kind = outputs.last_hidden_state[:, :tokens], type(outputs)
        else:
            if found == "warm":
                found = self._capture(cache, storage, kwargs, ids, positions)
                if found is None:
                    return type(self.module).forward(self.module, **kwargs)
                graphs.put(storage, key, found)
            assert graphs.pool is not None
            with graphs.pool.turn():
                found.input_ids.copy_(ids)
                found.position_ids.copy_(positions)
                found.graph.replay()
                hidden = found.hidden[:, :tokens].clone()
            kind, dtype = found.kind, found.dtype
        storage.used.fill_(tokens)
        for layer in cache.layers:
            layer.filled(tokens, length, dtype)
        return kind(last_hidden_state=hidden, past_key_values=cache)

    def _padded(
        self, cache: Any, storage: Storage, kwargs: dict[str, Any], input_ids: Tensor, positions: Tensor
    ) -> tuple[Any, torch.dtype]:
        """What the module makes of padded prompts, and the dtype of keys. Storage alone is written to."""
        own = _counting_by_itself(cache)
        given = {
            **kwargs,
            "input_ids": input_ids,
            "position_ids": positions,
            "attention_mask": None,
            "past_key_values": own,
            "return_dict": True,
        }
        storage.together = True
        try:
            outputs = type(self.module).forward(self.module, **given)
        finally:
            storage.together = False
        return outputs, own.layers[0].dtype

    def _capture(
        self, cache: Any, storage: Storage, kwargs: dict[str, Any], ids: Tensor, positions: Tensor
    ) -> _Prompt | None:
        """A graph of a prompt; None, and no graphs from now on, where the module cannot be captured."""
        graphs = self._graphs
        pool = graphs.pool_for(ids.numel())
        largest = graphs.largest
        cache, kwargs = _counting_by_itself(cache), {**kwargs, "past_key_values": None}
        with torch.inference_mode(False):  # See CapturedGraph.
            ids, positions = ids.clone(), positions.clone()

        def run() -> tuple[Tensor, type, torch.dtype]:
            outputs, dtype = self._padded(cache, storage, kwargs, ids, positions)
            hidden: Tensor = outputs.last_hidden_state
            if largest is not None:
                hidden = largest.hidden.view(-1)[: hidden.numel()].view(hidden.shape).copy_(hidden)
            return hidden, type(outputs), dtype

        try:
            graph = CapturedGraph(run, pool)
        except RuntimeError as error:
            graphs.clear()
            graphs.refused = str(error).splitlines()[0]
            logger.warning(
                "Prompts are not captured as CUDA graphs: %s. What they give is the same.", graphs.refused
            )
            return None
        constants = cache.layers[0].quantizer.constants(storage.device)
        hidden, kind, dtype = graph.result
        made = _Prompt(graph, ids, positions, hidden, kind, dtype, constants)
        graphs.largest = largest or made
        return made


def _counting_by_itself(cache: Any) -> Any:
    """A cache of the same storage."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def _is_full(mask: Any, input_ids: Tensor) -> bool:
    """Whether nothing is masked. Waits for the GPU, as transformers does to find whether a mask is needed."""
    return isinstance(mask, Tensor) and mask.shape == input_ids.shape and bool(mask.all())


def _positions(given: Tensor | None, input_ids: Tensor, tokens: int) -> Tensor:
    """Of all tokens, padding included, ``[batch, length]``."""
    length = input_ids.shape[1]
    if given is None:
        return torch.arange(length, device=input_ids.device).expand_as(input_ids)
    beyond = given[:, -1:] + torch.arange(1, length - tokens + 1, device=given.device)
    return torch.cat((given, beyond), 1).expand_as(input_ids)
