"""The measuring tools: data sets, a load generator for any OpenAI-compatible server, and what they print."""
