"""The choice of the next token from logits."""
