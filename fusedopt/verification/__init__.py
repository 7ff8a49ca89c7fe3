"""The equivalence gate: every optimizer on every engine against independent references.

``references`` has textbook loops, ``oracles`` other packages' optimizers, ``cases`` the table of what is
compared, ``trajectory`` the gradients and schedules, and ``gate`` the rule that decides.
"""
