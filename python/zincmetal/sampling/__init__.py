"""Room of sampling: chooses the next token from logits."""
