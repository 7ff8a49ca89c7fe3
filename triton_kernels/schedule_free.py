"""What the schedule-free rules share: an average of iterates in the place of a schedule.

``c = w / (sum of w)`` with ``w = t^r lr_max^power``; ``y <- y + c (z - y) - lr (1 - beta (1 - c)) u``,
``z <- z - lr u``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import power


@triton.jit
def scheduled(lr, beta, warmup_steps, r, weight_lr_power, s):
    """How far y goes towards z, how far along its direction, and how far z does; and the scalars after it."""
    step, weight_sum, lr_max = s
    warmed = tl.where(warmup_steps > step, step / tl.where(warmup_steps > step, warmup_steps, 1.0), 1.0)
    now = lr * warmed
    most = tl.maximum(now, lr_max)
    of_none = tl.where(weight_lr_power == 0, 1.0, 0.0)
    weight = power(step, r) * tl.where(most > 0, power(tl.where(most > 0, most, 1.0), weight_lr_power), of_none)
    total = weight_sum + weight
    share = tl.where(total != 0, weight / tl.where(total != 0, total, 1.0), 0.0)
    return share, now * (1 - beta * (1 - share)), now, (step, total, most)
