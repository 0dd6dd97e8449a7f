"""The data command's work: fetch the human ratings, split them, make comparisons, prompts and an independent judge."""
