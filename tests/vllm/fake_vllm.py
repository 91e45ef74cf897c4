"""vLLM's models on a CPU, without its compiled extensions: its wheel is for CUDA.

:func:`prepare` makes vLLM take this machine for one with an H100, and replaces what only its own kernels
compute (attention, the choice of experts) by formulas. What the plugin does is real: registration, the
building of models, loading, linears, experts and heads. Several processes of tensor parallelism are threads
here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["REASON", "Served", "engine_config", "has_vllm", "prepare", "serve", "tensors_of"]

REASON = "needs vLLM: make test-vllm makes an environment with it"
_CAPABILITY = 90


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    try:
        return bool(importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return False


@functools.cache
def prepare() -> None:
    """Make vLLM usable here, and register the plugin. For the whole process, once."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    _stub_extensions()
    _stub_image_processing()
    _stub_structured_output()
    _fake_platform()
    _mock_kernels()
    _replace_kernels()
    import rrsq.vllm

    rrsq.vllm.register()


def _stub_extensions() -> None:
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"):
        sys.modules[name] = types.ModuleType(name)
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        library.define(f"cutlass_{name}(int capability) -> bool")
        library.impl(f"cutlass_{name}", lambda capability: True, "CompositeExplicitAutograd")
    _kept.append(library)


def _mock_kernels() -> None:
    """Ops of the compiled extensions that are looked up. vLLM declares some by what it finds: import it."""
    import vllm._custom_ops  # noqa: F401

    namespace: Any = torch._ops._OpNamespace
    find = namespace.__getattr__

    def find_or_mock(self: Any, name: str) -> Any:
        try:
            return find(self, name)
        except AttributeError:
            if self.__dict__.get("name") in ("_C", "_moe_C", "_C_cache_ops"):
                return MagicMock()
            raise

    namespace.__getattr__ = find_or_mock


def _stub_image_processing() -> None:
    """Classes of transformers that need torchvision, which models that see name and text does not need."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for file, classes in {
        "image_processing_gemma3": ("Gemma3ImageProcessor",),
        "processing_gemma3": ("Gemma3Processor", "Gemma3ProcessorKwargs"),
    }.items():
        module = types.ModuleType(f"transformers.models.gemma3.{file}")
        for name in classes:
            setattr(module, name, type(name, (), {}))
        sys.modules[module.__name__] = module


def _stub_structured_output() -> None:
    """Its package imports grammars that are not installed; requests only need one of its files."""
    import vllm

    package = types.ModuleType("vllm.v1.structured_output")
    package.__path__ = [str(Path(vllm.__file__).parent / "v1" / "structured_output")]
    sys.modules[package.__name__] = package


def _fake_platform() -> None:
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    def number(capability: Any) -> int:
        return capability[0] * 10 + capability[1] if isinstance(capability, tuple) else capability

    class FakeHopper(NonNvmlCudaPlatform):
        device_type = "cpu"
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        has_device_capability = classmethod(lambda cls, c, device_id=0: number(c) <= _CAPABILITY)
        is_device_capability = classmethod(lambda cls, c, device_id=0: number(c) == _CAPABILITY)
        is_device_capability_family = classmethod(lambda cls, c, device_id=0: c // 10 == 9)
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * 2**30)
        import_kernels = classmethod(lambda cls: None)

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            module = "vllm.distributed.device_communicators.base_device_communicator"
            return f"{module}.DeviceCommunicatorBase"

    vllm.platforms._current_platform = FakeHopper()


def _replace_kernels() -> None:
    import vllm._custom_ops
    import vllm.model_executor.layers.vocab_parallel_embedding as embedding
    import vllm.utils.torch_utils
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe.runner import moe_runner, shared_experts
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.transformers.base import Base
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    vllms = Attention.forward
    Attention.forward = lambda self, *args, **kwargs: (_attention if self.kv_cache.numel() == 0 else vllms)(
        self, *args, **kwargs
    )
    vllm.utils.torch_utils.PIN_MEMORY = False
    TritonAttentionBackend.supports_head_size = classmethod(lambda cls, size: True)
    vllm._custom_ops.topk_softmax = _topk_softmax
    shared_experts.aux_stream = lambda: None
    # vLLM's op finds the layer by its name, which those of several processes share here.
    moe_runner.MoERunner._select_forward = lambda self: (
        lambda x, logits, shared, ids, name, size: self._forward_impl(x, logits, shared, ids)
    )
    # It would change the classes of transformers for the rest of the process.
    Base._decorate_for_torch_compile = lambda self, **kwargs: None
    # vLLM looks at each class of models in a process of its own, which takes seconds.
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(
        self.load_model_cls()
    )
    compiled = embedding.get_masked_input_and_mask
    embedding.get_masked_input_and_mask = getattr(compiled, "__wrapped__", compiled)


def _attention(self: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Causal attention over the tokens of one call, ``[tokens, heads * head_dim]`` each."""
    tokens = q.shape[0]

    def heads(x: Tensor, repeats: int) -> Tensor:
        return x.view(tokens, -1, self.head_size).transpose(0, 1).repeat_interleave(repeats, 0)

    group = self.num_heads // self.num_kv_heads
    scores = heads(q, 1) @ heads(k, group).transpose(-1, -2) * self.impl.scale
    cap = getattr(self.impl, "logits_soft_cap", None)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(tokens).unsqueeze(1) - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (self.sliding_window or tokens))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ heads(v, group)).transpose(0, 1).reshape(tokens, -1)


def _topk_softmax(
    weights: Tensor, indices: Tensor, unused: Tensor, logits: Tensor, renormalize: bool = False, *args: Any
) -> None:
    values, chosen = logits.float().softmax(-1).topk(weights.shape[1], -1)
    weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
    indices.copy_(chosen)


class _Ranks:
    """A tensor-parallel group whose members are threads of this process, in place of vLLM's."""

    def __init__(self, original: Any, size: int) -> None:
        self._original = original
        self._local = threading.local()
        self._barrier = threading.Barrier(size)
        self._parts: list[Any] = [None] * size
        self.world_size = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    @property
    def rank_in_group(self) -> int:
        return self._local.rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(x), dim)

    gather = all_gather

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._parts[self.rank_in_group] = x
        self._barrier.wait(60)
        parts = list(self._parts)
        self._barrier.wait(60)
        return parts

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each member returns; an error of one of them is raised."""
        results: list[Any] = [None] * self.world_size
        errors: list[BaseException] = []

        def member(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return results


class Served:
    """A checkpoint as vLLM has it.

    Attributes:
        models: one of each process.
    """

    def __init__(self, config: Any, ranks: _Ranks, models: list[Any]) -> None:
        self.config = config
        self.models = models
        self._ranks = ranks

    def logits(self, tokens: Tensor) -> Tensor:
        """``[tokens, vocabulary]`` for a prompt of token ids ``[tokens]``."""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context

        def run(rank: int) -> Tensor:
            model = self.models[rank]
            with torch.inference_mode():
                return model.compute_logits(model(tokens, torch.arange(tokens.shape[0])))

        with _group(self._ranks), set_current_vllm_config(self.config), set_forward_context({}, self.config):
            return self._ranks.run(run)[0]


_kept: list[Any] = []


def engine_config(folder: Path, ranks: int = 1, **options: Any) -> Any:
    """What vLLM makes of its arguments when an engine starts."""
    prepare()
    from vllm.engine.arg_utils import EngineArgs

    os.environ["WORLD_SIZE"] = str(ranks)
    chosen = {
        "enforce_eager": True,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 40,
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "external_launcher" if ranks > 1 else None,
        "attention_backend": None if _has_cache(folder, options) else "TRITON_ATTN",
        "compilation_config": {"custom_ops": ["none"]},
    }
    return EngineArgs(model=str(folder), **{**chosen, **options}).create_engine_config()


def _has_cache(folder: Path, options: dict[str, Any]) -> bool:
    """Whether a checkpoint's own cache is used, which chooses its attention."""
    description = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    chosen = options.get("kv_cache_dtype", "auto") == "auto"
    return chosen and description.get("recipe", {}).get("kv_cache") is not None


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def serve(folder: Path, ranks: int = 1, weights: dict[str, Tensor] | None = None, **options: Any) -> Served:
    """Build vLLM's model for each process, and load a checkpoint (or ``weights``) into it as vLLM does."""
    config = engine_config(folder, ranks, **options)
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    def load(rank: int) -> Any:
        model = initialize_model(config)
        model.load_weights(tensors_of(folder) if weights is None else iter(weights.items()))
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        return model.eval()

    with set_current_vllm_config(config):
        group = _Ranks(_process_group(), ranks)
        context = config.compilation_config.static_forward_context
        with _group(group):
            models = []
            for rank in range(ranks):  # One after the other: they register their layers by name.
                context.clear()
                group._local.rank = rank
                models.append(load(rank))
    return Served(config, group, models)


def _process_group() -> Any:
    """vLLM's groups of one process, made anew: which there are depends on the model."""
    from vllm.distributed import init_distributed_environment, parallel_state

    if not torch.distributed.is_initialized():
        file = f"file://{os.environ.setdefault('RRSQ_TEST_RENDEZVOUS', f'/tmp/rrsq-{os.getpid()}')}"
        init_distributed_environment(1, 0, file, 0, "gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1)
    group = parallel_state.get_tp_group()
    group.use_custom_op_call = False
    return group


class _group:  # noqa: N801
    """While it is entered, a group of threads is vLLM's tensor-parallel group."""

    def __init__(self, ranks: _Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        from vllm.distributed import parallel_state

        self.before, parallel_state._TP = parallel_state._TP, self.ranks

    def __exit__(self, *args: Any) -> None:
        from vllm.distributed import parallel_state

        parallel_state._TP = self.before
