"""``python -m zincmetal.check [FILE]``: whether this machine computes what it should, kernel by kernel.

``worker`` runs the checks in a process of its own and says what it found; ``runner`` starts it, and starts it anew
where a check took the process or the device down; ``report`` shows the results. ``cases`` and ``compare`` hold the
kernels to the CPU lane, ``tokens`` a whole model, and ``timing`` says how fast the hot shapes run.
"""
