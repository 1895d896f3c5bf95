"""The calls of users: a loaded model, text in, text out."""
