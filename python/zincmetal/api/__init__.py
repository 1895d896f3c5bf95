"""Calls of users: a loaded model, text in, text out."""
