"""Ready tools: toolkits that an environment takes in by composition, `tools = (Arithmetic(),)`."""
