"""The passes of a step over tensors. A step does as many as its rule and options ask for, in one launch or several."""

from __future__ import annotations

from enum import IntFlag

from fusedopt.rule import Rule


class Pass(IntFlag):
    """What a launch does, in this order. csrc/core/step.h has the same, and a test compares the two."""

    NORM = 1  # add up the gradients' squares
    SUMS = 2  # add up what the rule measures, over segments
    SCOPES = 4  # add that up over scopes, and find the largest scores there
    UPDATE = 8  # step, count the step, and add up what the rule concludes
    EPILOGUE = 16  # put that into scalars

    @classmethod
    def of(cls, rule: type[Rule], scope: str) -> Pass:
        """Those that a rule needs, without the norm."""
        passes = cls.UPDATE
        if rule.measures:
            passes |= cls.SUMS
        if rule.has_sums() and scope != "tensor":
            passes |= cls.SCOPES
        return passes | cls.EPILOGUE if rule.epilogue else passes
