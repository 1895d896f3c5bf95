"""Checks of this machine: every kernel and a model's first tokens against the CPU, and speed.

``runner`` starts a process for the checks, and another one when a check ends the process or loses the device. In that
process ``worker`` runs the checks and reports each result. The checks:

- ``cases`` has a small operation for every kernel; ``compare`` runs it on the device and on the CPU;
- ``mapped`` reads weights through a mapped file;
- ``tokens`` makes the first tokens of a model, ``running`` runs the engine for longer;
- ``timing`` measures common shapes, ``dispatches`` the dispatches of a decode step.

``machine`` asks a Mac for facts, ``inputs`` makes random weights and guarded buffers, ``results`` has the result of a
check. ``cli/check.py`` is the command.
"""
