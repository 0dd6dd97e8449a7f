"""The engine on vLLM. What runs inside vLLM's own processes: `plugin`, `scheduler`, `weights`, `staging`."""
