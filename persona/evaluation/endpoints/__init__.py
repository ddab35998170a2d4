"""Models behind OpenAI-compatible HTTP endpoints: how they are asked, how fast, at what cost."""
