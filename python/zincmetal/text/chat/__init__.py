"""Turns the messages of a chat into a prompt with the template of the model."""
