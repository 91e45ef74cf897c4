"""A mixture of experts: in full precision, behind an online rotation, or with packed INT4 weights.

transformers keeps the experts of a layer in two parameters, ``gate_up_proj [experts, 2 * intermediate,
hidden]`` and ``down_proj [experts, hidden, intermediate]``. :class:`Experts` takes the place of its module:
each of the two is a module here, whose forms take part in rotation and quantization like linears do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import kernels
from ...kernels import Routing
from .gradient import StraightThrough, needs_gradient
from .input import InputQuantizer, PreparedLinear
from .linear import PackedWeight
from .rotation import rotated_input

__all__ = ["ExpertLinear", "Experts", "QuantizedExpertLinear"]


class ExpertLinear(nn.Module):
    """One linear of every expert in full precision: a loop over the experts that have tokens.

    Args:
        weight: ``[experts, out, in]``.
    """

    bias: None = None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, routing: Routing, rows_per_token: int) -> Tensor:
        """``[tokens, in]`` to ``[rows, out]``; see :func:`rrsq.kernels.grouped_linear`."""
        y = x.new_empty(routing.experts.shape[0], self.weight.shape[1])
        for expert in routing.experts.unique().tolist():
            rows = (routing.experts == expert).nonzero().squeeze(1)
            y[rows] = nn.functional.linear(x[rows // rows_per_token], self.weight[expert])
        return y

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        experts, out_features, in_features = self.weight.shape
        return f"experts={experts}, in_features={in_features}, out_features={out_features}"


class QuantizedExpertLinear(PackedWeight):
    """One linear of every expert from packed INT4 codes, ``[experts, out, in]``.

    Each token is quantized once, whatever number of experts it goes to.

    Args:
        num_experts: how many there are.
        in_features: channels in; even.
        out_features: channels out.
        group_size: channels an integer multiplier covers, a divisor of ``in_features``; None for none.
        signed: whether multipliers have a sign.
        input_quantizer: quantizer of the input.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        group_size: int | None,
        signed: bool = False,
        input_quantizer: InputQuantizer,
    ) -> None:
        super().__init__(
            (num_experts, out_features, in_features),
            group_size=group_size,
            signed=signed,
            input_quantizer=input_quantizer,
        )

    def forward(self, x: Tensor, routing: Routing, rows_per_token: int) -> Tensor:
        """``[tokens, in]`` to ``[rows, out]``; see :func:`rrsq.kernels.grouped_linear`."""
        if needs_gradient(x):
            return StraightThrough.apply(
                x,
                lambda x: self._multiply(x, routing, rows_per_token),
                lambda grad: self._input_gradient(grad, x.shape[0], routing, rows_per_token),
            )
        if is_compiling() or not self._stays() or not x.numel():
            return self._multiply(x, routing, rows_per_token)
        quantize, multiply = self._prepared.find(x, lambda x: self._prepare(x, routing, rows_per_token))
        operand = self.input_quantizer.operand(quantize(x), x.shape[0])
        return multiply(*operand.grouped(), *routing, rows_per_token)

    def _prepare(self, x: Tensor, routing: Routing, rows_per_token: int) -> PreparedLinear:
        quantize = self.input_quantizer.prepare(x)
        operand = self.input_quantizer.operand(quantize(x), x.shape[0])
        rows = *operand.grouped(), *routing, rows_per_token
        return quantize, kernels.grouped_linear.prepare(*rows, *self._weight(x.dtype))

    def _multiply(self, x: Tensor, routing: Routing, rows_per_token: int) -> Tensor:
        rows = *self.input_quantizer(x).grouped(), *routing, rows_per_token
        return kernels.grouped_linear(*rows, *self._weight(x.dtype))

    def _weight(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The last arguments of a product."""
        weight = self.weight_packed, self.weight_scale, self.weight_multiplier
        return *weight, dtype, self._cpu_operand()

    def _input_gradient(self, grad: Tensor, tokens: int, routing: Routing, rows_per_token: int) -> Tensor:
        weight = self.dequantized_weight()
        rows = grad.new_empty(grad.shape[0], weight.shape[-1], dtype=torch.float32)
        for expert in routing.experts.unique().tolist():
            chosen = routing.experts == expert
            rows[chosen] = grad[chosen].float() @ weight[expert]
        return self.input_quantizer.undo(rows.view(tokens, rows_per_token, -1).sum(1))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        experts, out_features, half = self.weight_packed.shape
        return (
            f"experts={experts}, in_features={2 * half}, out_features={out_features}, "
            f"group_size={self.group_size}"
        )


class Experts(nn.Module):
    """All experts of a layer, called like the module of transformers that it replaces.

    Args:
        gate_up_proj: ``[tokens, hidden]`` to ``[rows, 2 * intermediate]``, the gates first.
        down_proj: ``[rows, intermediate]`` to ``[rows, hidden]``.
        act_fn: applied to the gates.
        num_experts: how many there are.
    """

    gate_up_proj: Any
    down_proj: Any

    def __init__(
        self,
        gate_up_proj: nn.Module,
        down_proj: nn.Module,
        act_fn: Callable[[Tensor], Tensor],
        num_experts: int,
    ) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.num_experts = num_experts

    @classmethod
    def of(cls, module: Any) -> Experts:
        """In place of transformers' module, with its parameters."""
        gate_up_proj, down_proj = ExpertLinear(module.gate_up_proj), ExpertLinear(module.down_proj)
        return cls(gate_up_proj, down_proj, module.act_fn, module.gate_up_proj.shape[0])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' weighted sum.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int ``[tokens, top_k]``, the experts of each token.
            top_k_weights: floating point ``[tokens, top_k]``, what they count.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``hidden_states``.
        """
        routing = kernels.route_rows(top_k_index.reshape(-1), self.num_experts)
        inner = self.intermediate(hidden_states, routing, top_k_index.shape[1])
        y = self.down_proj(inner, routing, 1)
        return (y.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def intermediate(self, hidden_states: Tensor, routing: Routing, rows_per_token: int) -> Tensor:
        """What ``down_proj`` is given: ``[tokens, hidden]`` to ``[rows, intermediate]``."""
        gate, up = self.gate_up_proj(hidden_states, routing, rows_per_token).chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def input_of_gate_up(self, hidden_states: Tensor) -> Tensor:
        """What ``gate_up_proj`` multiplies of ``[tokens, hidden]``, behind an online rotation."""
        return rotated_input(self.gate_up_proj, hidden_states)

    def input_of_down(self, hidden_states: Tensor, expert: int) -> Tensor:
        """What one expert's ``down_proj`` multiplies, behind its online rotation, if all tokens go there."""
        experts = torch.full((hidden_states.shape[0],), expert, device=hidden_states.device)
        inner = self.intermediate(hidden_states, kernels.route_rows(experts, self.num_experts), 1)
        return rotated_input(self.down_proj, inner)
