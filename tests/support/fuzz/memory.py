"""Folder of files that stay in memory: on a disk, a fuzzer would wait for it most of the time."""

from __future__ import annotations

import os

_SHARED = "/dev/shm"  # of Linux, where fuzzers run

#: For ``dir`` of tempfile. None, which is where temporary files go, if there is no such folder.
FOLDER = _SHARED if os.access(_SHARED, os.W_OK) else None
