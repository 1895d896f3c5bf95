"""Sequences in time: prefill, decode, snapshots."""
