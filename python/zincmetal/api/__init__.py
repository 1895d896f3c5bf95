"""What users call: a loaded model, and text in and out of it."""
