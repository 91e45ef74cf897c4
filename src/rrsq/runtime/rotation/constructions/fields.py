"""Arithmetic of the finite fields GF(p^m), as far as Paley's construction needs it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FiniteField", "finite_field", "prime_power"]

Polynomial = tuple[int, ...]  # coefficients, constant term first


def prime_power(q: int) -> tuple[int, int] | None:
    """Return ``(p, m)`` with ``q = p^m`` and ``p`` prime, or None where ``q`` is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


@dataclass(frozen=True)
class FiniteField:
    """GF(p^m) as polynomials over GF(p) modulo a monic irreducible polynomial of degree m.

    The element ``a_0 + a_1 x + ... + a_{m-1} x^{m-1}`` is numbered ``a_0 + a_1 p + ... + a_{m-1} p^{m-1}``,
    so that the elements of a prime field are numbered as usual.
    """

    characteristic: int
    degree: int
    modulus: Polynomial

    @property
    def order(self) -> int:
        """Number of elements, ``q = p^m``."""
        return self.characteristic**self.degree

    def polynomial(self, number: int) -> Polynomial:
        """Coefficients of the element with this number."""
        p = self.characteristic
        return tuple(number // p**i % p for i in range(self.degree))

    def number(self, polynomial: Polynomial) -> int:
        """Number of the element with these coefficients."""
        return sum(a * self.characteristic**i for i, a in enumerate(polynomial))

    def multiply(self, a: int, b: int) -> int:
        """Product of two elements, by number."""
        product = _multiply(self.polynomial(a), self.polynomial(b), self.characteristic)
        return self.number(_remainder(product, self.modulus, self.characteristic))

    def differences(self) -> Tensor:
        """Numbers of all differences: int64 ``[q, q]`` with ``[i, j]`` the number of ``a_i - a_j``."""
        powers = [self.characteristic**i for i in range(self.degree)]
        elements = torch.arange(self.order)
        total = torch.zeros(self.order, self.order, dtype=torch.int64)
        for power in powers:
            digit = elements // power % self.characteristic
            total += (digit[:, None] - digit[None, :]) % self.characteristic * power
        return total

    def quadratic_character(self) -> Tensor:
        """χ(a) for every element: int8 ``[q]``, 0 for zero, 1 for a non-zero square, -1 otherwise."""
        character = torch.full((self.order,), -1, dtype=torch.int8)
        character[[self.multiply(a, a) for a in range(1, self.order)]] = 1
        character[0] = 0
        return character


@lru_cache(maxsize=64)
def finite_field(q: int) -> FiniteField:
    """The field with ``q`` elements; its modulus is the first irreducible polynomial in lexical order.

    Raises:
        ValueError: ``q`` is not a prime power.
    """
    factors = prime_power(q)
    if factors is None:
        raise ValueError(f"there is no field with {q} elements: {q} is not a prime power")
    p, m = factors
    modulus = next(f for f in _monic(p, m) if _is_irreducible(f, p))
    return FiniteField(p, m, modulus)


def _monic(p: int, degree: int) -> itertools.chain[Polynomial]:
    """All monic polynomials of a degree over GF(p), highest coefficients varying slowest."""
    lower = itertools.product(range(p), repeat=degree)
    return itertools.chain((*reversed(coefficients), 1) for coefficients in lower)


def _is_irreducible(f: Polynomial, p: int) -> bool:
    """Whether no monic polynomial of degree 1 to deg(f)/2 divides ``f`` over GF(p)."""
    degree = len(f) - 1
    divisors = itertools.chain.from_iterable(_monic(p, d) for d in range(1, degree // 2 + 1))
    return all(any(_remainder(f, g, p)) for g in divisors)


def _multiply(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    product = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = (product[i + j] + x * y) % p
    return tuple(product)


def _remainder(f: Polynomial, monic: Polynomial, p: int) -> Polynomial:
    """Remainder of ``f`` divided by a monic polynomial, over GF(p)."""
    rest = list(f)
    degree = len(monic) - 1
    while len(rest) > degree:
        lead = rest.pop()
        for i in range(degree):
            rest[i + len(rest) - degree] = (rest[i + len(rest) - degree] - lead * monic[i]) % p
    return tuple(rest)
