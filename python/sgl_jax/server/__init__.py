"""HTTP: OpenAI's protocol and the native one, over a GenerationService."""
