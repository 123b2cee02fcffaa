"""A server for clients of the OpenAI API: files, batches, completions and chats, in the one block of one engine."""
