"""Hadamard matrices in exact integer arithmetic, and plans against dense products in float64."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrsq.errors import HadamardOrderError
from rrsq.runtime.rotation.constructions import CONSTRUCTIONS, find_construction
from rrsq.runtime.rotation.constructions.circulant import circulant
from rrsq.runtime.rotation.constructions.fields import finite_field, prime_power
from rrsq.runtime.rotation.constructions.paley import jacobsthal
from rrsq.runtime.rotation.constructions.turyn import turyn_type
from rrsq.runtime.rotation.constructions.williamson import williamson_sequences
from rrsq.runtime.rotation.hadamard import (
    HadamardPlan,
    base_matrix,
    hadamard_matrix,
    is_known_order,
    orthonormal,
    plan_hadamard,
    rotate_columns,
)

MULTIPLES_OF_FOUR = range(4, 257, 4)
NOT_BY_PALEY = (92, 116, 156, 172, 184, 188, 232, 236)

# size -> (block, base), worked out by hand from the factors of the size.
MODEL_SIZES = {
    576: (576, 36),
    896: (896, 28),
    960: (960, 60),
    1536: (1536, 12),
    2048: (2048, 1),
    2560: (2560, 20),
    3072: (3072, 12),
    3584: (3584, 28),
    4096: (4096, 1),
    4864: (4864, 76),
    5120: (5120, 20),
    8192: (8192, 1),
    8960: (8960, 140),
    9728: (9728, 76),
    11008: (11008, 172),
    12288: (12288, 12),
    13824: (13824, 108),
    14336: (14336, 28),
    17408: (17408, 68),
    18944: (18944, 148),
    25600: (25600, 100),
    27648: (27648, 108),
    28672: (28672, 28),
    29568: (4224, 132),
}


def assert_hadamard(H: torch.Tensor, order: int) -> None:
    assert H.shape == (order, order)
    assert H.dtype == torch.int8
    assert bool((H.abs() == 1).all())
    exact = H.to(torch.int64)
    assert torch.equal(exact @ exact.T, order * torch.eye(order, dtype=torch.int64))


class TestMatrix:
    @pytest.mark.parametrize("order", [1, 2, *MULTIPLES_OF_FOUR])
    def test_every_order_to_256_is_hadamard(self, order: int) -> None:
        assert is_known_order(order)
        assert_hadamard(hadamard_matrix(order), order)

    # Every construction by itself, also where a doubling is preferred: 244 = 3^5 + 1, 252 = 2 (5^3 + 1).
    @pytest.mark.parametrize(
        ("construction", "order"),
        [(c, n) for c in CONSTRUCTIONS for n in (*MULTIPLES_OF_FOUR, 344) if c.covers(n)],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_every_construction_is_hadamard(self, construction, order: int) -> None:
        assert_hadamard(construction.build(order), order)

    def test_which_orders_paley_leaves_to_others(self) -> None:
        paley = [c for c in CONSTRUCTIONS if c.name.startswith("Paley")]

        def reached(order: int) -> bool:
            return (
                order <= 2 or any(c.covers(order) for c in paley) or (order % 8 == 0 and reached(order // 2))
            )

        assert tuple(n for n in MULTIPLES_OF_FOUR if not reached(n)) == NOT_BY_PALEY

    @pytest.mark.parametrize("order", [-4, 0, 3, 6, 14, 231, 260, 292, 428, 926])
    def test_unknown_order_raises(self, order: int) -> None:
        assert not is_known_order(order)
        with pytest.raises(HadamardOrderError, match=str(order)):
            hadamard_matrix(order)

    def test_callers_do_not_share_a_matrix(self) -> None:
        hadamard_matrix(12).zero_()
        assert_hadamard(hadamard_matrix(12), 12)

    @pytest.mark.parametrize("order", NOT_BY_PALEY)
    def test_searches_are_fast_and_repeatable(self, order: int) -> None:
        size = order if order % 8 else order // 2  # 184 and 232 are doublings
        construction = find_construction(size)
        assert construction is not None
        start = time.process_time()
        first = construction.build(size)
        assert time.process_time() - start < 2.0
        assert torch.equal(first, construction.build(size))


class TestConstructions:
    @given(st.integers(2, 400))
    @settings(deadline=None)
    def test_prime_power_against_brute_force(self, q: int) -> None:
        primes = [p for p in range(2, q + 1) if all(p % d for d in range(2, p))]
        expected = next(((p, m) for p in primes for m in range(1, 9) if p**m == q), None)
        assert prime_power(q) == expected

    @pytest.mark.parametrize("q", [7, 9, 25, 27, 49, 81, 121])
    def test_field_axioms(self, q: int) -> None:
        field = finite_field(q)
        products = torch.tensor([[field.multiply(a, b) for b in range(q)] for a in range(q)])
        assert torch.equal(products, products.T)
        assert torch.equal(products[1], torch.arange(q))
        # Every non-zero row is a permutation: there are inverses and no divisors of zero.
        assert torch.equal(products[1:].sort(dim=1).values, torch.arange(q).expand(q - 1, q))
        # a (b - c) = a b - a c
        differences = field.differences()
        left = products[:, differences]
        right = differences[products[:, :, None], products[:, None, :]]
        assert torch.equal(left, right)

    def test_no_field_of_six_elements(self) -> None:
        with pytest.raises(ValueError, match="6 is not a prime power"):
            finite_field(6)

    @pytest.mark.parametrize("q", [3, 5, 9, 13, 27, 49])
    def test_jacobsthal_identity(self, q: int) -> None:
        Q = jacobsthal(q).to(torch.int64)
        assert torch.equal(Q @ Q.T, q * torch.eye(q, dtype=torch.int64) - 1)
        assert torch.equal(Q.T, Q if q % 4 == 1 else -Q)
        assert not Q.sum(dim=1).any()

    def test_circulant_shifts_to_the_right(self) -> None:
        assert circulant(torch.tensor([1, 2, 3])).tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]

    @pytest.mark.parametrize(
        ("n", "multiplier", "symmetric"), [(39, 5, False), (43, 7, True), (13, 3, False)]
    )
    def test_williamson_sequences_cancel(self, n: int, multiplier: int, symmetric: bool) -> None:
        rows = torch.tensor(williamson_sequences(n, multiplier))
        assert rows.abs().eq(1).all()
        correlations = [(rows * rows.roll(s, dims=1)).sum().item() for s in range(n)]
        assert correlations == [4 * n] + [0] * (n - 1)
        assert torch.equal(rows, rows[:, [multiplier * i % n for i in range(n)]])
        assert torch.equal(rows, rows[:, [-i % n for i in range(n)]]) == symmetric

    def test_williamson_search_without_a_solution_says_so(self) -> None:
        with pytest.raises(ValueError, match="length 47 with multiplier 2"):
            williamson_sequences(47, 2)

    @pytest.mark.parametrize("n", [8, 10, 16, 20])
    def test_turyn_type_sequences_cancel(self, n: int) -> None:
        sequences = [s.to(torch.int64) for s in turyn_type(n)]
        assert [len(s) for s in sequences] == [n, n, n, n - 1]
        for shift in range(1, n):
            X, Y, Z, W = (int((s[:-shift] * s[shift:]).sum()) for s in sequences)
            assert X + Y + 2 * Z + 2 * W == 0


class TestPlan:
    @pytest.mark.parametrize("size", MODEL_SIZES)
    def test_sizes_of_real_models(self, size: int) -> None:
        plan = plan_hadamard(size)
        assert (plan.block, plan.base) == MODEL_SIZES[size]
        assert plan.power == plan.block // plan.base
        assert plan.is_full == (size != 29568)

    @pytest.mark.parametrize(
        ("size", "shards", "max_base", "block", "base"),
        [
            (14336, 8, 256, 1792, 28),
            (11008, 2, 256, 5504, 172),
            (11008, 8, 256, 1376, 172),
            (11008, 1, 128, 256, 1),
            (9728, 8, 256, 1216, 76),
            (29568, 1, 1024, 29568, 924),  # Paley II: 924 = 2 (461 + 1)
            (12, 1, 256, 12, 12),
            (14, 1, 256, 2, 1),
            (9, 1, 256, 1, 1),
            (1, 1, 256, 1, 1),
        ],
    )
    def test_shards_and_bounds(self, size: int, shards: int, max_base: int, block: int, base: int) -> None:
        plan = plan_hadamard(size, shards=shards, max_base=max_base)
        assert plan == HadamardPlan(size, block, base)

    @given(st.integers(1, 40000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 32, 256]))
    @settings(deadline=None)
    def test_block_is_the_largest_and_base_the_smallest(self, part: int, shards: int, max_base: int) -> None:
        plan = plan_hadamard(part * shards, shards=shards, max_base=max_base)
        bases = [b for b in range(1, max_base + 1) if is_known_order(b)]
        doublings = {(b << p, b) for b in bases for p in range(16) if part % (b << p) == 0}
        block = max(size for size, _ in doublings)
        assert plan.block == block
        assert plan.base == min(b for size, b in doublings if size == block)

    @pytest.mark.parametrize(
        ("size", "shards", "max_base"), [(0, 1, 256), (64, 0, 256), (64, 1, 0), (64, 3, 256), (-8, 1, 256)]
    )
    def test_impossible_requests_raise(self, size: int, shards: int, max_base: int) -> None:
        with pytest.raises(HadamardOrderError):
            plan_hadamard(size, shards=shards, max_base=max_base)

    @pytest.mark.parametrize(
        ("size", "block", "base"),
        [(64, 48, 12), (64, 64, 12), (36, 36, 12), (28, 28, 7), (0, 1, 1), (8, 0, 1)],
    )
    def test_inconsistent_plans_raise(self, size: int, block: int, base: int) -> None:
        with pytest.raises(HadamardOrderError):
            HadamardPlan(size, block, base)


class TestRotation:
    def test_base_matrix(self) -> None:
        base = base_matrix(plan_hadamard(14336))
        assert base.dtype == torch.float32
        assert torch.equal(base.to(torch.int8), hadamard_matrix(28))

    @given(st.integers(1, 250), st.sampled_from([1, 2, 4]))
    @settings(deadline=None)
    def test_random_plans_are_orthogonal_and_factored(self, part: int, shards: int) -> None:
        size = part * shards
        plan = plan_hadamard(size, shards=shards)
        R = orthonormal(plan, torch.float64)
        assert torch.allclose(R @ R.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
        W = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        rotated = rotate_columns(W, plan)
        assert rotated.dtype == torch.float64
        assert torch.allclose(rotated, W @ R, rtol=0, atol=1e-11)

    @pytest.mark.parametrize(
        "plan", [HadamardPlan(48, 24, 24), HadamardPlan(48, 24, 12), HadamardPlan(16, 8, 4)]
    )
    def test_same_rotation_however_the_block_is_factored(self, plan: HadamardPlan) -> None:
        smallest = plan_hadamard(plan.block)
        R = torch.kron(
            torch.eye(plan.size // plan.block, dtype=torch.float64), orthonormal(smallest, torch.float64)
        )
        assert torch.equal(orthonormal(plan, torch.float64), R)
        rotated = rotate_columns(torch.eye(plan.size, dtype=torch.float64), plan)
        assert torch.allclose(rotated, R, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("size", [8960, 11008, 18944, 29568])
    def test_large_sizes_keep_norms_and_mix_whole_blocks(self, size: int) -> None:
        plan = plan_hadamard(size)
        W = torch.zeros(2, size, dtype=torch.float64)
        W[0, size // 3] = 1.0
        W[1] = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotated = rotate_columns(W, plan)
        assert torch.allclose(rotated.norm(dim=1), W.norm(dim=1), rtol=1e-12)
        mixed = rotated[0].abs()
        assert int((mixed > 0).sum()) == plan.block
        assert torch.allclose(
            mixed[mixed > 0], torch.tensor(plan.block, dtype=torch.float64).rsqrt(), rtol=1e-12
        )

    def test_low_precision_is_computed_in_float32(self) -> None:
        plan = plan_hadamard(96)
        W = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        rotated = rotate_columns(W, plan)
        assert rotated.dtype == torch.float32
        expected = W.double() @ orthonormal(plan, torch.float64)
        assert torch.allclose(rotated.double(), expected, rtol=0, atol=1e-5)

    def test_wrong_number_of_columns_raises(self) -> None:
        with pytest.raises(HadamardOrderError, match="64 columns"):
            rotate_columns(torch.zeros(2, 64), plan_hadamard(96))
