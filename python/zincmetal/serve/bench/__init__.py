"""Measures servers of OpenAI's chat API: times of tokens, throughput, what the cache saved, and what clients leave."""
