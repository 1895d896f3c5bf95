"""Server: the APIs of OpenAI and Anthropic over HTTP, and the chat page."""
