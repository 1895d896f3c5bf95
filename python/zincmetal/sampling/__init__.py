"""The next token, chosen from logits."""
