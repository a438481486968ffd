"""From text to packed rows: readers, tokenizer, Megatron index files, packing, sampling, needle samples."""
