"""What a kernel is specialised to: the signatures of a plan's rows, and what its rule adds up.

Signatures are written as fusedopt.operands.Signature writes them, such as ``dense param=bf16 grad=bf16 exp_avg=fp32``,
and joined by semicolons; none is an empty string. One kernel serves all of them; a plan of one has no branch. The first
word has ``+noise`` where noise is drawn, and ``+replaced`` before it where the
parameter is not stepped but replaced; an average is the last operand, as in ``slow=fp32``. Behind the addresses of
operands come those of partners, of such as have one.

OPTIONS says whether groups ask for averages, noise or cautious decay, and who counts steps: it is empty if none does,
else ``rule`` or ``engine``.

Sums are written as ``group measures=2 epilogue=1 shared=0,2 joined=0``: the scope; how many sums there are before the
step; the numbers of the scalars that have those of the epilogue, and of those that a scope shares; and whether the
tables have what the step needs, or the slots, see sums.py. Of a rule without sums they are an empty string.
"""

import triton
import triton.language as tl

from fusedopt.operands import AVERAGES


@triton.constexpr_function
def count(signatures):
    """How many signatures there are."""
    return len(signatures.split(";")) if signatures else 0


@triton.constexpr_function
def is_strided(signatures, k):
    """Whether the operands of signature k are walked by strides."""
    return signatures.split(";")[k].startswith(("strided", "padded"))


@triton.constexpr_function
def is_padded(signatures, k):
    """Whether the slices of signature k have empty places behind them."""
    return signatures.split(";")[k].startswith("padded")


@triton.constexpr_function
def _codec(signatures, k, operand):
    return signatures.split(";")[k].split(" ")[1 + operand].split("=")[1]


@triton.constexpr_function
def _n_operands(signatures, k):
    return len(signatures.split(";")[k].split(" ")) - 1


@triton.constexpr_function
def codec(signatures, k, operand):
    """The name of the codec of an operand of signature k: 0 the parameter, 1 the gradient, then the states."""
    return _codec(signatures, k, operand)


MASTERS = ("split", "master_bf16", "master_fp16")  # codecs with partners of the operand's shape


@triton.constexpr_function
def _element(signatures, k, operand):
    name = _codec(signatures, k, operand)
    if name.startswith("q8"):
        return "uint8"
    if name in ("stochastic", "split"):
        return "bf16"
    return name.replace("master_", "")


@triton.constexpr_function
def element(signatures, k, operand):
    """The element type of an operand."""
    return tl.dtype(_element(signatures, k, operand))


@triton.constexpr_function
def has_partner(signatures, k, operand):
    """Whether an operand has a second address."""
    name = _codec(signatures, k, operand)
    return name in MASTERS or name.startswith("q8")


@triton.constexpr_function
def partner(signatures, k, operand):
    """Where the second address of an operand is among a row's addresses."""
    before = [_codec(signatures, k, j) for j in range(operand)]
    n = sum(name in MASTERS or name.startswith("q8") for name in before)
    return _n_operands(signatures, k) + n


@triton.constexpr_function
def partner_offset(signatures, k, operand):
    """Where the offsets in an operand's partner are among a row's, where it has the operand's shape."""
    return _n_operands(signatures, k) + sum(_codec(signatures, k, j) in MASTERS for j in range(operand))


@triton.constexpr_function
def partner_size(signatures, k, operand):
    """How many bytes an element of an operand's partner has; of scales, which blocks have, 0."""
    name = _codec(signatures, k, operand)
    return 2 if name == "split" else 4 if name in MASTERS else 0


@triton.constexpr_function
def n_offsets(signatures, k):
    """How many offsets an element of signature k has: of operands, of partners, and of the logical index."""
    names = [_codec(signatures, k, j) for j in range(_n_operands(signatures, k))]
    is_drawn = "stochastic" in names or signatures.split(";")[k].split(" ")[0].endswith("+noise")
    return len(names) + sum(name in MASTERS for name in names) + is_drawn


@triton.constexpr_function
def has_blocks(signatures, k):
    """Whether any operand of signature k has blocks."""
    return "=q8" in signatures.split(";")[k]


@triton.constexpr_function
def compute(signatures, k):
    """The type that signature k computes in."""
    return tl.float64 if " param=fp64 " in signatures.split(";")[k] + " " else tl.float32


@triton.constexpr_function
def widest(signatures):
    """The widest type that any signature computes in."""
    return tl.float64 if " param=fp64 " in signatures else tl.float32


@triton.constexpr_function
def draws(signatures, k):
    """Whether the gradients of signature k get noise."""
    return signatures.split(";")[k].split(" ")[0].endswith("+noise")


@triton.constexpr_function
def replaces(signatures, k):
    """Whether the direction of signature k takes the parameter's place."""
    return "+replaced" in signatures.split(";")[k].split(" ")[0]


@triton.constexpr_function
def average(signatures, k):
    """The average of signature k, which is its last operand; empty without one."""
    last = signatures.split(";")[k].split(" ")[-1].split("=")[0]
    return last if last in AVERAGES else ""


@triton.constexpr_function
def states(signatures, k):
    """The names of the rule's states of signature k, joined by commas."""
    named = (operand.split("=")[0] for operand in signatures.split(";")[k].split(" ")[3:])
    return ",".join(name for name in named if name not in AVERAGES)


@triton.constexpr_function
def n_states(signatures, k):
    """How many states of the rule signature k has."""
    return n_operands(signatures, k) - 2 - (average(signatures, k) != "")


@triton.constexpr_function
def n_operands(signatures, k):
    """How many operands signature k has."""
    return _n_operands(signatures, k)


@triton.constexpr_function
def has(names, name):
    """Whether a state is among the names."""
    return name in names.split(",")


@triton.constexpr_function
def index(names, name):
    """Where a state stands among the names."""
    return names.split(",").index(name)


@triton.constexpr_function
def itemsize(signatures, k, operand):
    """How many bytes an element of an operand has."""
    return tl.dtype(_element(signatures, k, operand)).primitive_bitwidth // 8


def describe(scope: str, n_measures: int, epilogue: list[int], shared: list[int], joined: bool) -> str:
    """Sums as kernels take them."""
    lists = (",".join(map(str, numbers)) for numbers in (epilogue, shared))
    return "{} measures={} epilogue={} shared={} joined={}".format(scope, n_measures, *lists, int(joined))


@triton.constexpr_function
def _field(sums, name):
    """What is behind a name; empty without sums."""
    return next((part.split("=")[1] for part in sums.split(" ") if part.startswith(name + "=")), "")


@triton.constexpr_function
def in_channels(sums):
    """Whether rows have several segments."""
    return sums.startswith("channel ")


@triton.constexpr_function
def spans_rows(sums):
    """Whether scopes have several rows."""
    return sums.startswith(("group ", "all "))


@triton.constexpr_function
def has_tables(sums):
    """Whether what the step needs is in the tables of scopes, or of segments, and not in slots."""
    return not sums.startswith("tensor ") or _field(sums, "joined") == "1"


@triton.constexpr_function
def has_scopes(sums):
    """Whether scopes are more than segments."""
    return bool(sums) and not sums.startswith("tensor ")


@triton.constexpr_function
def n_measures(sums):
    """How many sums there are before the step."""
    return int(_field(sums, "measures") or 0)


@triton.constexpr_function
def n_listed(sums, name):
    """How many scalars are listed, of the epilogue or shared ones."""
    return len(_field(sums, name).split(",")) if _field(sums, name) else 0


@triton.constexpr_function
def listed(sums, name, k):
    """The number of one of them among all scalars."""
    return int(_field(sums, name).split(",")[k])
