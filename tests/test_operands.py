"""Operands: codecs, signatures, and the table of what is legal."""

import pytest
import torch
from helpers import params

import fusedopt
from fusedopt import layout, operands
from fusedopt.engines.tables import SHARE_SIZES, partition
from fusedopt.rule import State


def test_every_role_takes_plain_codecs_and_exact_states_what_float32_fits_in():
    for role in ("param", "grad", "state"):
        assert all(operands.illegal(role, dtype) is None for dtype in (*operands.FLOATING, *operands.COMPLEX))
        may = "float32, float64, bfloat16, float16" + (", uint8" if role == "state" else "")
        assert operands.illegal(role, torch.int8) == f"torch.int8; it may be {may}"
    assert operands.illegal("exact state", torch.complex64) is None
    assert operands.illegal("exact state", torch.bfloat16) == "torch.bfloat16; it may be float32, float64"


def test_codecs_keep_to_what_tables_have_room_for():
    for codec in operands.CODECS:
        assert 1 <= len(codec.dtypes) <= layout.ADDRESSES and 1 <= codec.block <= 256


def test_signature_names_what_kernels_are_specialised_to():
    p = torch.zeros(3)
    named = ("param", operands.BF16), ("grad", operands.BF16), ("exp_avg", operands.FP32)
    signature = operands.Signature.of(True, [operands.Operand(*one, (p,)) for one in named])
    assert str(signature) == "strided param=bf16 grad=bf16 exp_avg=fp32"
    assert signature.states == ("exp_avg",) and signature.codecs == ("bf16", "bf16", "fp32")


class ExactRule(fusedopt.Lion.rule):
    states = (State("exp_avg", exact=True),)


class ExactLion(fusedopt.Lion):
    rule = ExactRule


def test_a_state_that_must_be_exact_is_not_narrow(engine):
    (p,) = params((5,))
    p.grad = torch.ones(5)
    optimizer = ExactLion([p], engine=engine)
    optimizer.step()
    before = p.detach().clone()
    state = {"exp_avg": optimizer.state[p]["exp_avg"].bfloat16()}
    with pytest.raises(ValueError, match=r"'exp_avg' of .* has dtype torch.bfloat16; it may be float32, float64"):
        optimizer.state[p] = state
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[p]["exp_avg"], state["exp_avg"].float())
    with pytest.raises(ValueError, match="'exp_avg' of .* has dtype torch.int32; it may be float32, float64"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"exp_avg": state["exp_avg"].int()}}})


@pytest.mark.parametrize("n_tiles", [0, 1, 5, 119, 120, 1000, 12_345, 2**31 - 1])
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_shares_cover_the_tiles_and_the_last_are_the_large_ones(n_tiles, programs):
    begins = partition(n_tiles, programs, SHARE_SIZES)
    sizes = [b - a for a, b in zip(begins, [*begins[1:], n_tiles], strict=True)]
    assert begins[0] == 0 and sum(sizes) == n_tiles and (min(sizes) > 0 or not n_tiles)
    if n_tiles >= 120 * programs:
        assert len(begins) == len(SHARE_SIZES) * programs
        rounds = [sizes[k : k + programs] for k in range(0, len(sizes), programs)]
        assert all(max(earlier) <= min(later) for earlier, later in zip(rounds, rounds[1:], strict=False))
        assert sum(rounds[-1]) > 0.8 * n_tiles
    else:
        assert len(begins) == max(1, min(programs, n_tiles)) and max(sizes) - min(sizes) <= 1
