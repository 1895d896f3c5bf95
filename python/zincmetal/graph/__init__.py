"""Mathematics of a step: operations over activations of T rows, and their fusion."""
