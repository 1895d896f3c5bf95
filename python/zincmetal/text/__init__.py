"""Room of text: turns text into token ids, ids into text, and chats into prompts."""
