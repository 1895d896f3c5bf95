"""Models with a name in place of a path: which there are, whether they fit this machine, and where their files are."""

from .demo import DEMO_PACKAGE, GET_DEMO, demo_model

__all__ = ["DEMO_PACKAGE", "GET_DEMO", "demo_model"]
