"""Mutations of safetensors files: of their bytes, their headers and their numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hostile.case import Case, outcomes, read_tensors, write_tensors

__all__ = ["file_cases"]

FILE = "model.safetensors"
PACKED = "model.layers.0.mlp.up_proj.weight_packed"
SCALE = "model.layers.1.self_attn.k_proj.weight_scale"
NORM = "model.layers.0.self_attn.q_proj.bias"
TENSORS = (PACKED, SCALE, NORM)
SAME_WIDTH = ("I8", "BOOL", "F8_E4M3", "I32", "U32")  # Of the packed codes and of the scales.
ONE_OF_A_KIND = (
    *TENSORS,
    "model.embed_tokens.weight_int8",
    "model.embed_tokens.weight_scale",
    "lm_head.weight_int8",
    "lm_head.weight_scale",
    "model.layers.0.mlp.down_proj.weight_multiplier",
    "model.layers.1.self_attn.kv_quantizer.keys.offset",
    "rotation_signs.head_signs",
)


def file_cases() -> Iterator[Case]:
    """All of them."""
    yield from _bytes()
    yield from _entries()
    yield from _json()
    yield from _names()
    yield from _numbers()


def _bytes() -> Iterator[Case]:
    def truncate(keep: float) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            content = (folder / FILE).read_bytes()
            (folder / FILE).write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])

        return mutate

    generator = random.Random(0)
    for keep in (0, 1, 7, 8, 9, 64, 1000, *(generator.random() for _ in range(12))):
        yield Case("truncated", f"{keep:.3g}", truncate(keep))

    def append(junk: bytes) -> Callable[[Path], Any]:
        return lambda folder: (folder / FILE).open("ab").write(junk)

    for junk in (b"\0", b"x" * 7, b"{}" * 4000, b"PK\x03\x04" * 64):
        yield Case("appended", f"{len(junk)}", append(junk))

    def set_length(change: Callable[[int], int]) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            content = (folder / FILE).read_bytes()
            length = change(int.from_bytes(content[:8], "little"))
            (folder / FILE).write_bytes(length.to_bytes(8, "little") + content[8:])

        return mutate

    lengths: dict[str, Callable[[int], int]] = {
        "zero": lambda n: 0,
        "one": lambda n: 1,
        "less": lambda n: n - 1,
        "more": lambda n: n + 1,
        "8-more": lambda n: n + 8,
        "2^31": lambda n: 2**31,
        "2^62": lambda n: 2**62,
        "2^64-1": lambda n: 2**64 - 1,
    }
    for name, change in lengths.items():
        yield Case("header-length", name, set_length(change))

    def flip(seed: int) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            content = bytearray((folder / FILE).read_bytes())
            length = int.from_bytes(content[:8], "little")
            draw = random.Random(seed)
            content[8 + draw.randrange(length)] ^= 1 << draw.randrange(8)
            (folder / FILE).write_bytes(bytes(content))

        return mutate

    for seed in range(24):
        yield Case("header-bit", str(seed), flip(seed), expected=outcomes("either", inspect="shown"))


def _entries() -> Iterator[Case]:
    def set_entry(name: str, **fields: Any) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            header, data = read_tensors(folder / FILE)
            for key, value in fields.items():
                header[name][key] = value(header[name][key], header) if callable(value) else value
            write_tensors(folder / FILE, header, data)

        return mutate

    offsets: dict[str, Any] = {
        "overlap": lambda old, header: header["lm_head.weight_int8"]["data_offsets"],
        "swapped": lambda old, header: old[::-1],
        "shifted": lambda old, header: [old[0] + 1, old[1] + 1],
        "negative": lambda old, header: [-8, old[1]],
        "giant": [2**62, 2**62 + 8],
        "beyond-64-bits": [0, 2**70],
        "float": [0.0, 8.0],
        "text": ["0", "8"],
        "three": [0, 4, 8],
        "null": None,
        "bool": [False, True],
        "mapping": {"0": 8},
    }
    for name, value in offsets.items():
        for tensor in TENSORS[:2]:
            yield Case("offsets", f"{name}-{tensor[-6:]}", set_entry(tensor, data_offsets=value))
    shapes: dict[str, Any] = {
        "negative": lambda old, header: [-1, *old[1:]],
        "transposed": lambda old, header: [2 * old[0], *[n // 2 for n in old[1:]], *([] if old[1:] else [0])],
        "one-more": lambda old, header: [old[0] + 1, *old[1:]],
        "another-dimension": lambda old, header: [*old, 1],
        "10^12": lambda old, header: [10**12, *old[1:]],
        "overflow": [2**32, 2**32],
        "beyond-64-bits": [2**80],
        "zero": lambda old, header: [0, *old[1:]],
        "float": lambda old, header: [float(n) for n in old],
        "text": "96",
        "null": None,
        "nested": [[96], [32]],
        "many": [1] * 100000,
        "many-giants": [2**63 - 1] * 20000,
    }
    for name, value in shapes.items():
        for tensor in TENSORS[:2]:
            expected = outcomes(inspect="shown" if name in ("transposed", "another-dimension") else "error")
            yield Case("shape", f"{name}-{tensor[-6:]}", set_entry(tensor, shape=value), expected=expected)
    for dtype in ("I8", "BOOL", "F8_E4M3", "U16", "F64", "F3", "u8", "", None, 8, ["U8"], "C64"):
        expected = outcomes(inspect="shown" if dtype in SAME_WIDTH else "error")
        yield Case("dtype", f"packed-{dtype}", set_entry(PACKED, dtype=dtype), expected=expected)
    for dtype in ("I32", "U32", "BF16", "float32", {}):
        expected = outcomes(inspect="shown" if dtype in SAME_WIDTH else "error")
        yield Case("dtype", f"scale-{dtype}", set_entry(SCALE, dtype=dtype), expected=expected)


def _json() -> Iterator[Case]:
    def set_header(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            header, data = read_tensors(folder / FILE)
            write_tensors(folder / FILE, change(json.dumps(header).encode()), data)

        return mutate

    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    headers: dict[str, Callable[[bytes], bytes]] = {
        "list": lambda text: b"[" + text + b"]",
        "number": lambda text: b"7",
        "null": lambda text: b"null",
        "empty": lambda text: b"{}",
        "no-text": lambda text: b"",
        "no-json": lambda text: b"<html>Not found</html>",
        "deep-list": lambda text: b"[" * 200000,
        "deep-object": lambda text: b'{"a":' * 100000 + b"1" + b"}" * 100000,
        "deep-metadata": lambda text: b'{"__metadata__":' * 50000 + b"{}" + b"}" * 50000,
        "no-utf8": lambda text: text.replace(b"lm_head", b"\xff\xfe_head"),
        "utf16": lambda text: text.decode().encode("utf-16"),
        "bom": lambda text: b"\xef\xbb\xbf" + text,
        "nul": lambda text: text + b"\0",
        "unclosed": lambda text: text[:-1],
        "second-object": lambda text: text + b"{}",
        "long-number": lambda text: (
            b'{"a":{"dtype":"U8","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,0]}}'
        ),
        "nan": lambda text: text.replace(b'"shape": [', b'"shape": [NaN, ', 1),
        "entry-is-a-list": lambda text: text[:-1] + b',"x":[1]}',
        "entry-is-text": lambda text: text[:-1] + b',"x":"y"}',
        "the-same-twice": lambda text: text[:-1] + b',"' + PACKED.encode() + b'":' + entry + b"}",
        "metadata-list": lambda text: text.replace(b'{"format": "pt"}', b"[1]"),
        "metadata-number": lambda text: text.replace(b'"pt"', b"3"),
        "metadata-nested": lambda text: text.replace(b'"pt"', b'{"a":{"b":[]}}'),
    }
    for name, change in headers.items():
        yield Case("header", name, set_header(change))
    harmless: dict[str, Callable[[bytes], bytes]] = {
        "spaces": lambda text: text + b" " * 4096,
        "metadata-more": lambda text: text.replace(b'"pt"', b'"pt", "author": "nobody"'),
        "order-of-keys": lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode(),
    }
    for name, change in harmless.items():
        yield Case("header-harmless", name, set_header(change), expected=outcomes("same"))


def _names() -> Iterator[Case]:
    def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
        return lambda folder: change_tensors(folder, edit)

    for name in ONE_OF_A_KIND:
        yield Case(
            "missing", name, change(lambda t, name=name: t.pop(name)), expected=outcomes(inspect="shown")
        )
        yield Case(
            "renamed",
            name,
            change(lambda t, name=name: t.update({name + "x": t.pop(name)})),
            expected=outcomes(inspect="shown"),
        )
    for name in ("extra", "", "model.layers.7.mlp.up_proj.weight_packed", "../../x", "\x1b[2J", "n" * 100000):
        edit = change(lambda t, name=name: t.update({name: torch.zeros(2)}))
        yield Case("unknown-tensor", repr(name[:20]), edit, expected=outcomes(inspect="shown"))
    for name in TENSORS:
        for what, convert in (
            ("row", lambda x: x[:-1].clone()),
            ("flat", lambda x: x.flatten()[:, None].clone()),
            ("scalar", lambda x: x.flatten()[0].clone()),
            ("int64", lambda x: x.long()),
            ("bool", lambda x: x.bool()),
        ):
            edit = change(lambda t, name=name, convert=convert: t.update({name: convert(t[name])}))
            yield Case("converted", f"{what}-{name[-6:]}", edit, expected=outcomes(inspect="shown"))


def _numbers() -> Iterator[Case]:
    # Numbers are looked at when they are loaded; ``inspect`` reads headers only.
    seen_by_loading = outcomes(inspect="same")

    def put(name: str, value: float, where: int = 3) -> Callable[[Path], Any]:
        return lambda folder: change_tensors(folder, lambda t: t[name].view(-1).__setitem__(where, value))

    nan, inf = float("nan"), float("inf")
    for name in (
        SCALE,
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.1.mlp.gate_proj.weight_scale",
        "model.embed_tokens.weight_scale",
        "lm_head.weight_scale",
    ):
        for value in (nan, inf, -inf, 0.0, -0.0, -1e-3):
            yield Case(
                "scale",
                f"{value}-{name.removeprefix('model.layers.')[:-13]}",
                put(name, value),
                expected=seen_by_loading,
            )
    for name in ONE_OF_A_KIND:
        if name.endswith(("offset", "bias")):
            for value in (nan, inf, -inf):
                yield Case("not-finite", f"{value}-{name}", put(name, value), expected=seen_by_loading)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for value in (nan, inf, -inf):
            edit = put(name, value)
            yield Case("not-finite", f"{value}-{name}", edit, base="first", expected=seen_by_loading)
    for name in (
        "model.layers.0.mlp.down_proj.weight_multiplier",
        "model.layers.1.self_attn.v_proj.weight_multiplier",
    ):
        for number in (0, 16, 127, -128):
            yield Case("multiplier", f"{number}-{name[13:-18]}", put(name, number), expected=seen_by_loading)
    for name in ("residual", "head"):
        for number in (0, 2, -2, 127, -128):
            edit = put(f"rotation_signs.{name}_signs", number)
            yield Case("sign", f"{number}-{name}", edit, base="first", expected=seen_by_loading)
    order = "model.layers.0.mlp.down_input.channel_order"
    for where, number in ((0, -1), (1, 96), (2, 2**31 - 1), (3, -(2**31)), (95, 50)):
        yield Case("order", str(number), put(order, number, where), base="order", expected=seen_by_loading)

    def constant(folder: Path) -> None:
        change_tensors(folder, lambda t: t[order].fill_(0))

    yield Case("order", "constant", constant, base="order", expected=seen_by_loading)


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of the one file."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
