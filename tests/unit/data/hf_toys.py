"""Small tokenizer.json files, built as those of the known families are: same normalizer, splits, merges and decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _bytewise(lines: list[str], split: str, **options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def make_llama3(lines: list[str], folder: Path) -> None:
    """Byte-level BPE; <|begin_of_text|> before every text, no padding."""
    tokenizer = _bytewise(lines, LLAMA3_SPLIT, ignore_merges=True)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    _write(folder, tokenizer, "PreTrainedTokenizerFast", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def make_qwen(lines: list[str], folder: Path) -> None:
    """Byte-level BPE after NFC; nothing before a text; <think> is an added token, but not special."""
    tokenizer = _bytewise(lines, QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    settings: dict[str, Any] = {"add_bos_token": False, "bos_token": None, "pad_token": "<|endoftext|>"}
    _write(folder, tokenizer, "Qwen2Tokenizer", eos_token="<|im_end|>", **settings)


def make_llama2(lines: list[str], folder: Path) -> None:
    """BPE with byte fallback and a space before every text; its merges can put "</s>" together from letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    single = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=single, initial_alphabet=letters, limit_alphabet=110, show_progress=False
    )
    tokenizer.train_from_iterator((word for line in lines for word in line.split()), trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]
    vocabulary, merges = tree["model"]["vocab"], tree["model"]["merges"]
    for pair in (["<", "/"], ["s", ">"], ["</", "s>"]):
        vocabulary.setdefault("".join(pair), len(vocabulary))
        merges.append(pair)
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(folder, tokenizer, "LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=True, **names)


def _write(folder: Path, tokenizer: Tokenizer, tokenizer_class: str, **settings: Any) -> None:
    tokenizer.enable_truncation(max_length=16)  # files in the wild come with such; transformers takes no notice
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


MAKERS: dict[str, Callable[[list[str], Path], None]] = {
    "llama3": make_llama3,
    "qwen": make_qwen,
    "llama2": make_llama2,
}
