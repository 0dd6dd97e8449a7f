"""Models and tokenizers in Hugging Face form, as learner, reward service and generation read them.

`loader` reads weights, `facts` what the JSON files alone say, `tokenizer` and `chat` text,
`reward_model` the format of a reward model; `packing`, `token_head` and `attention` are the
arithmetic that they share. Torch is imported by the modules that compute, and by no other: `facts`,
`chat`, `packing` and `tokenizer` do without it until a tokenizer is loaded.
"""
