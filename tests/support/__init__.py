"""Helpers that tests of several rooms share. No test imports a test; all of them import from here."""
