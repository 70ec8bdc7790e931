"""What a user asks for: the question, the prompt it becomes and the answer it comes back as."""
