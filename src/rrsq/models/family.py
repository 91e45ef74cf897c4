"""What rrsq must know of a model family, as data.

A family names the modules of its decoder layer by what reads and writes what; everything else (sizes, biases,
grouped-query attention, tied embeddings, attention masks, window lengths) is read off the model itself.
docs/adding-a-model.md shows how one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .sizes import ModelSizes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LAYER_NORM", "RMS_NORM", "RMS_NORM_ONE_PLUS", "LinearInput", "ModelFamily", "NormKind"]


@dataclass(frozen=True)
class NormKind:
    """How the norms of a family work; all of a family's norms on the residual stream are of one kind.

    Attributes:
        offset: the gain is ``offset + weight``.
        centered: LayerNorm, which takes off the mean over the channels, and may add a bias.
    """

    offset: float = 0.0
    centered: bool = False


RMS_NORM = NormKind()
RMS_NORM_ONE_PLUS = NormKind(offset=1.0)
LAYER_NORM = NormKind(centered=True)


@dataclass(frozen=True)
class LinearInput:
    """One tensor that linears of a decoder layer read, with the linears that read it.

    Linears of one input share its quantization (serving engines fuse them) and its GPTQ Hessian.

    Attributes:
        name: what the input is, by which recipes refer to it. ``qkv`` and ``gate_up`` read the residual
            stream; ``o`` (all heads side by side) and ``down`` are read by linears that write to it.
        parent: module path of the linears' parent, from the decoder layer; empty for the layer itself.
        linears: attribute names of the linears in ``parent``; a fused projection is one of them.
        norm: path (from the layer) of the norm that produces the input, or None. Inputs may share a norm.
        output_norm: path (from the layer) of a norm between the linears and the residual stream, or None. Its
            gain stands in the way of R1, which then cannot be folded (:attr:`ModelFamily.folds_residual`).
        full_precision: paths (from the layer) of further linears that read the same input and are never
            quantized, such as a router.
        experts: ``parent`` is the experts of a mixture as transformers keeps them, called with tokens and
            what a router chose for them; its parameters ``gate_up_proj`` and ``down_proj``, ``[experts, out,
            in]`` each, are the linears of the inputs ``gate_up`` and ``down``.
    """

    name: Literal["qkv", "o", "gate_up", "down"]
    parent: str
    linears: tuple[str, ...]
    norm: str | None = None
    output_norm: str | None = None
    full_precision: tuple[str, ...] = ()
    experts: bool = False

    @property
    def path(self) -> str:
        """The input's own name in a decoder layer, such as ``mlp.down``."""
        return _join(self.parent, self.name)

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of :attr:`linears`, from the decoder layer."""
        return tuple(_join(self.parent, name) for name in self.linears)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Channels of the input and rows of all linears that read it, of one expert where there are some."""
        parameters = dict(layer.named_parameters())
        shapes = [
            tuple(parameters[path if path in parameters else f"{path}.weight"].shape[-2:])
            for path in self.linear_paths
        ]
        return shapes[0][1], sum(rows for rows, _ in shapes)

    def is_in(self, layer: nn.Module) -> bool:
        """Whether a decoder layer has this input: the layers of one model may differ."""
        parent = dict(layer.named_modules()).get(self.parent)
        return parent is not None and hasattr(parent, self.linears[0])

    @property
    def reads_residual(self) -> bool:
        """The input is the residual stream, normed or as it is."""
        return self.name in ("qkv", "gate_up")

    @property
    def writes_residual(self) -> bool:
        """The linears' outputs are added to the residual stream."""
        return not self.reads_residual

    @property
    def quantizer_name(self) -> str:
        """Attribute of ``parent`` under which a quantized model keeps the input's quantizer."""
        return f"{self.name}_input"

    @property
    def fused_name(self) -> str:
        """Attribute of ``parent`` under which a quantized model keeps the input's linears as one."""
        return f"{self.name}_fused"


@dataclass(frozen=True)
class ModelFamily:
    """A family of decoder-only models.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        architecture: class name of the causal language model.
        inputs: the inputs of quantized linears of one decoder layer, in the order the layer runs them. Where
            layers differ, those of all of them; a layer has the ones whose modules it has.
        norm: kind of the norms that ``inputs`` and ``final_norm`` name.
        embedding, layers, final_norm, head: module paths from the model's root.
        positions: module path of a learned position embedding that is added to ``embedding``, or None.
        rotary: module path of the rotary embedding, or None where keys are not rotated.
        rotary_by_layer_type: the rotary embedding takes the layer's entry of ``config.layer_types``.
        rotates_keys: whether the attention of a layer applies RoPE, of a configuration and the layer's index.
        attention: module path of the attention from the decoder layer.
        value: name of the projection in the attention whose last ``kv_heads * head_dim`` rows make values:
            ``v_proj``, or a fused one.
        needs_bos: the models are trained on sequences that all begin with the BOS token and answer badly
            without; a window of text then begins with it.
        intermediate_size: field of the configuration that holds it.
        more_intermediate: further sizes of MLPs that a configuration asks for, such as those of experts.
        not_covered: says of a configuration why the family does not cover it, or returns None.
        public: sizes of public models, for the documentation.
        served: whether checkpoints have been shown to give the same in vLLM; they are refused there if not.
        tested_on: public checkpoints or packages the family was run on.
    """

    model_type: str
    architecture: str
    inputs: tuple[LinearInput, ...]
    norm: NormKind = RMS_NORM
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    rotary_by_layer_type: bool = False
    rotates_keys: Callable[[Any, int], bool] = lambda config, index: True
    attention: str = "self_attn"
    value: str = "v_proj"
    needs_bos: bool = False
    intermediate_size: str = "intermediate_size"
    more_intermediate: Callable[[Any], tuple[int, ...]] = lambda config: ()
    not_covered: Callable[[Any], str | None] = lambda config: None
    public: Mapping[str, ModelSizes] = field(default_factory=dict)
    served: bool = True
    tested_on: tuple[str, ...] = ()

    @property
    def folds_residual(self) -> bool:
        """Whether R1 can be folded into the weights: no norm stands between a linear and the stream.

        Where it cannot, inputs that read the stream are rotated online instead.
        """
        return all(entry.output_norm is None for entry in self.inputs)

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """Paths (from a decoder layer) of the norms that produce its inputs, each once."""
        return tuple(dict.fromkeys(entry.norm for entry in self.inputs if entry.norm is not None))

    @property
    def decoder(self) -> str:
        """Module path of what holds the embedding and the layers."""
        return self.layers.rpartition(".")[0]

    def input(self, name: str) -> LinearInput:
        """The first :class:`LinearInput` called ``name``."""
        return next(entry for entry in self.inputs if entry.name == name)

    def inputs_in(self, layer: nn.Module) -> tuple[LinearInput, ...]:
        """The inputs that a decoder layer has."""
        return tuple(entry for entry in self.inputs if entry.is_in(layer))

    @property
    def places(self) -> tuple[str, ...]:
        """Module paths, from the model's root, of all that a quantization reads or changes."""
        paths = (self.embedding, self.positions, self.layers, self.final_norm, self.head)
        return tuple(path for path in paths if path is not None)

    def other_modules(self, model: nn.Module) -> list[str]:
        """Paths of the largest modules with weights outside of :attr:`places`, such as a vision tower."""
        found: list[str] = []

        def visit(path: str, module: nn.Module) -> None:
            for name, child in module.named_children():
                below = f"{path}.{name}".removeprefix(".")
                if below in self.places:
                    continue
                if any(place.startswith(f"{below}.") for place in self.places):
                    visit(below, child)
                elif child.state_dict():
                    found.append(below)

        visit("", model)
        return found

    def sizes(self, config: Any) -> ModelSizes:
        """The sizes of a model of this family."""
        text = config.get_text_config()
        return ModelSizes.from_config(text, self.intermediate_size, self.more_intermediate(text))

    def layer_name(self, index: int) -> str:
        """Module path of a decoder layer, from the model's root."""
        return f"{self.layers}.{index}"


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
