"""Room of measuring: the speed of a model and of exact shapes, its roofline, and the verdict on a change."""
