"""Answers of chat models: reasoning, text and tool calls, a format for each family."""
