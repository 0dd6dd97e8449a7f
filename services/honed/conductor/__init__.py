"""The run: its phases, its prompts, its admission budget, and the processes that carry it."""
