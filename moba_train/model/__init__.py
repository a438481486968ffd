"""The model: schema -> Megatron-core GPT whose core attention is ours."""
