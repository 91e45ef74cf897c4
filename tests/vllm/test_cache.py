"""The quantized KV cache in vLLM's pages: what is stored, what is computed from it, and when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm, serve, tensors_of
from paged import Paged, Request, planned_cache
from servable import SERVABLE, llama

import rrsq
from rrsq.errors import UsageError
from rrsq.models import ModelSizes, family_for
from rrsq.runtime.assemble import attach_kv_quantizer
from tiny_families import TINY
from tiny_quantized import logits_of, random_tokens, recipe_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

FLOAT = ("activations={bits: 16}",)
SEEDS = (9, 10, 11)


def text_of(seed: int) -> Tensor:
    """37 random tokens, none of them special."""
    return random_tokens(37, seed=seed).clamp_max(500)


TEXTS = [text_of(seed) for seed in SEEDS]


def expected(folder: Path, text: Tensor) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of transformers."""
    return logits_of(rrsq.load(str(folder), device="cpu"), text.unsqueeze(0))[0]


def departing(logits: Tensor, wanted: Tensor) -> float:
    """Share of tokens whose logits differ: a key between two codes may fall either way by a sum's order."""
    difference = (logits - wanted).abs().amax(-1) / wanted.std()
    return float((difference > 1e-3).float().mean())


def play(paged: Paged, texts: list[Tensor]) -> list[Tensor]:
    """Logits of three texts that are run in parts, decoded, preempted, and begun with what is there."""
    first, second, third = (Request(text) for text in texts)
    parts: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    parts[0] += paged.step((first, 20))  # A whole prompt.
    parts[0] += paged.step((first, 1), padding=2)  # Decoding, in a graph of three rows.
    a, b = paged.step((first, 1), (second, 9))  # Decoding beside a prompt.
    parts[0].append(a)
    parts[1].append(b)
    a, b, c = paged.step((first, 3), (second, 11), (third, 18))  # Parts of prompts.
    for index, part in enumerate((a, b, c)):
        parts[index].append(part)
    first.preempt()
    third.preempt()
    third.begin_as(second, 1, paged.block_sizes[0])
    parts[2] = [parts[1][0], parts[1][1][: third.done - 9]]
    b, a = paged.step((second, 1), (first, 24))
    parts[0], _ = [a], parts[1].append(b)
    b, c = paged.step((second, 2), (third, 3))
    parts[1].append(b)
    parts[2].append(c)
    while first.done < 37:  # All decode.
        batch = [(r, i) for i, r in enumerate((first, second, third)) if r.done < 37]
        for (_, index), part in zip(batch, paged.step(*((r, 1) for r, _ in batch)), strict=True):
            parts[index].append(part)
    return [torch.cat(part) for part in parts.values()]


def check(folder: Path, seeds: tuple[int, ...] = SEEDS, **options: Any) -> Paged:
    """Play, and compare with transformers."""
    paged = Paged(serve(folder, **options))
    first, second, third = (text_of(seed) for seed in seeds)
    texts = [first, second, torch.cat([second[:16], third[16:]])]
    for text, logits in zip(texts, play(paged, texts), strict=True):
        assert departing(logits, expected(folder, text)[: len(logits)]) <= 0.1
    return paged


@pytest.mark.parametrize("name", SERVABLE)
def test_every_family(name: str, make: Make) -> None:
    check(make(name, SERVABLE[name](), FLOAT))


def test_the_language_model_of_one_that_sees(make: Make) -> None:
    # In the usual texts a key of one token lies on the border of two codes, and all behind it attend to it.
    check(make("gemma3", TINY["gemma3"](), FLOAT), seeds=(20, 21, 22))


KINDS = {
    "symmetric": "kv_cache={keys: {offset: none}, values: {rotate: false}}",
    "rotated values with an offset": "kv_cache={values: {rotate: true, offset: mean, zero_point: true}}",
    "8 bits": "kv_cache={keys: {bits: 8, offset: mean}, values: {bits: 8, group_size: 4}}",
    "some layers in 8 bits": "kv_cache.sensitive_layers=1",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_every_kind_of_cache(name: str, kind: str, make: Make) -> None:
    check(make(name, SERVABLE[name](), [*FLOAT, KINDS[kind]]))


def test_pages_hold_the_bytes_of_transformers_cache(make: Make) -> None:
    from rrsq.vllm.pages import PageLayout

    folder = make("qwen2", SERVABLE["qwen2"](), FLOAT)
    served = serve(folder)
    request = Request(TEXTS[0])
    paged = Paged(served)
    paged.step((request, 37))
    layer = served.models[0].model.layers[1].self_attn.attn
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(37, 2, 8, generator=generator) for _ in range(2))
    theirs = rrsq.load(str(folder), device="cpu").model.layers[1].self_attn.kv_quantizer
    place = torch.tensor(request.tables[0]).repeat_interleave(16)[:37] * 16 + torch.arange(37) % 16
    views = PageLayout.of(layer.cache_quantizer).views(paged.pages[layer.layer_name])
    layer.cache_quantizer.append(
        views, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], place, torch.arange(37)
    )
    wanted = theirs.encode(
        keys.transpose(0, 1)[None], values.transpose(0, 1)[None], torch.arange(37)[None, None, :, None]
    )
    assert theirs.keys.offset.abs().max() > 0.1  # Calibrated: Qwen2's keys have biases.
    for name, stored in zip(views._fields, views, strict=True):
        if stored is not None:
            own = stored[place // 16, :, place % 16].transpose(0, 1)
            torch.testing.assert_close(own, wanted[name][0], rtol=1e-3, atol=1e-5, msg=name)


def test_pages_lie_one_behind_the_other(make: Make) -> None:
    """The sections of a head fill its part of the page, without overlap, at multiples of 16 bytes."""
    from rrsq.vllm.pages import PageLayout

    paged = Paged(serve(make("qwen2", SERVABLE["qwen2"](), FLOAT)))
    layer, pages = next(iter(paged.pages.items()))
    config = paged.config.compilation_config.static_forward_context[layer]
    covered = torch.zeros(pages.numel(), dtype=torch.int)
    for view in PageLayout.of(config.cache_quantizer).views(pages):
        if view is not None:
            assert view.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
            assert view.stride(-1) == 1
            begin = (view.data_ptr() - pages.data_ptr()) + torch.arange(2) * view.stride(1) * view.itemsize
            assert (begin % 16 == 0).all()
            size = view.itemsize
            for index in torch.ones(view.shape).nonzero():
                at = int((index * torch.tensor(view.stride())).sum()) * size
                at += view.data_ptr() - pages.data_ptr()
                covered[at : at + size] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 3.3), (96, 3.3), (128, 3.3), (256, 3.3), (80, 2.9)])
def test_a_page_of_the_default_recipe(head_dim: int, ratio: float) -> None:
    """Against 16 bits; heads of 80 channels have groups of 16, since 32 does not divide them."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from rrsq.vllm.pages import PageLayout, QuantizedFullSpec

    cache = recipe_of("rrs-w4a4kv4").kv_cache
    assert cache is not None
    layer = torch.nn.Module()
    layer.self_attn = torch.nn.Module()
    sizes = ModelSizes(0, 0, 4, 2, head_dim, 1)
    quantizer = attach_kv_quantizer(layer, family_for(llama()), cache, sizes, None, 4)
    own = QuantizedFullSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=head_dim,
        dtype=torch.uint8,
        token_bytes=PageLayout.of(quantizer).token_bytes,
    )
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=head_dim, dtype=torch.bfloat16)
    assert own.page_size_bytes == 16 * sum(
        x.nbytes for x in quantizer.pages(1, 1, torch.device("cpu")) if x is not None
    )
    assert full.page_size_bytes / own.page_size_bytes >= ratio


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_capacity_against_16_bits(name: str, make: Make) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    groups = "{group_size: 12}"
    folder = make(name, SERVABLE[name](), [*FLOAT, f"kv_cache={{keys: {groups}, values: {groups}}}"])
    tokens = []
    for kind in ("auto", "bfloat16"):
        served = serve(folder, kv_cache_dtype=kind, dtype="bfloat16")
        tokens.append(get_kv_cache_capacity(served.config, planned_cache(served.config, 2**20))[0])
    # 12 channels: 2 * (6 + 2) bytes a token and head, not 48.
    assert tokens[0] / tokens[1] == pytest.approx(3, rel=0.02)


def attention_of(folder: Path, **options: Any) -> Any:
    return serve(folder, **options).models[0].model.layers[0].self_attn.attn


def test_another_dtype_is_vllms_own_cache(make: Make) -> None:
    folder = make("llama", llama())
    assert attention_of(folder).attn_backend.__name__.startswith("QuantizedCacheBackend_")
    other = attention_of(folder, kv_cache_dtype="bfloat16")
    assert other.attn_backend.__name__ == "TritonAttentionBackend"
    assert not hasattr(other, "cache_quantizer")


def test_a_checkpoint_without_a_quantized_cache(make: Make) -> None:
    other = attention_of(make("llama", llama(), ["kv_cache=null"]))
    assert other.attn_backend.__name__ == "TritonAttentionBackend"


def test_models_that_come_later_choose_for_themselves(make: Make) -> None:
    assert serve(make("llama", llama())).config.attention_config.backend is None


def test_another_attention_backend_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match=r"TRITON_ATTN cannot read.*--kv-cache-dtype bfloat16"):
        serve(make("llama", llama()), attention_backend="TRITON_ATTN")


def test_what_vllm_refuses_says_what_to_do(make: Make) -> None:
    with pytest.raises(UsageError, match=r"block_size not supported.*--kv-cache-dtype bfloat16"):
        serve(make("llama", llama()), block_size=8)


def test_a_decoding_batch_is_one_graph(make: Make) -> None:
    """Nothing of a batch's lengths is on the host."""
    paged = Paged(serve(make("llama", llama(), FLOAT)))
    assert paged.graphs.min_cg_support.name == "UNIFORM_BATCH"


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_process_has_the_offsets_of_its_heads(ranks: int, make: Make) -> None:
    """Two key heads: with four processes, two have the same one."""
    folder = make("llama", llama(), [f"rotation.shards={ranks}"])
    whole = dict(tensors_of(folder))["model.layers.1.self_attn.kv_quantizer.keys.offset"]
    assert whole.abs().max() > 0
    for rank, model in enumerate(serve(folder, ranks).models):
        own = model.model.layers[1].self_attn.attn.cache_quantizer.keys.offset
        assert own.dtype == torch.float32
        assert torch.equal(own, whole[rank * 2 // ranks : rank * 2 // ranks + 1])


def test_prompts_are_read_out_in_parts(make: Make) -> None:
    """No more keys at once than the longest text or a whole batch has."""
    folder = make("llama", llama(), FLOAT)
    paged = Paged(serve(folder, max_num_batched_tokens=40, max_num_seqs=4, enable_chunked_prefill=True))
    requests = [Request(text) for text in TEXTS]
    paged.step(*((request, 13) for request in requests))
    builder = paged.groups[0][0].get_metadata_builder(0)
    parts, build = [], builder.build
    builder.build = lambda *args, **kwargs: (
        parts.append(build(*args, **kwargs).prompts) or build(*args, **kwargs)
    )
    results = paged.step(*((request, 12) for request in requests))
    assert [sum(part.keys) for part in parts[0]] == [25, 25, 25]
    for text, logits in zip(TEXTS, results, strict=True):
        assert departing(logits, expected(folder, text)[13:25]) <= 0.1


def test_tokens_of_an_image_see_each_other(make: Make) -> None:
    """Against attention by hand: ranges come from vLLM, which cuts none of them in parts."""
    served = serve(make("llama", llama(), FLOAT))
    impl = served.models[0].model.layers[0].self_attn.attn.impl
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(6, 8, 12, generator=generator)
    keys, values = (torch.randn(9, 2, 12, generator=generator) for _ in range(2))
    out = impl._attend(query, keys, values, 2, [(6, 8)])  # Keys 2 to 10, queries 5 to 10.
    for row in range(6):
        seen = [n for n in range(9) if n + 2 <= row + 5 or (6 <= n + 2 <= 8 and 6 <= row + 5 <= 8)]
        for head in range(8):
            weights = (keys[seen, head // 4] @ query[row, head] * impl.scale).softmax(0)
            torch.testing.assert_close(out[row, head], weights @ values[seen, head // 4])
