"""The worker's HTTP API: OpenAI's completions and chat completions, and what is around them."""
