"""The bridge to servers that speak the OpenAI dialect: llama-server, mlx_lm.server, vLLM and others."""
