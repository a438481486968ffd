"""A sentencepiece BPE model as a tokenizer.json, which transformers loads.

Both merge the pair with the best rank first. Sentencepiece ranks merged pieces by score; here each way to cut a piece
into two that exist becomes a merge, in the order of scores. Pieces that a user defined are matched before anything is
merged, as they are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sentencepiece import sentencepiece_model_pb2

from moba_train.errors import CheckpointError

SPACE = "▁"
# Kinds of pieces, as sentencepiece_model.proto numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_DECODERS: Final = (
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)


def tokenizer_files(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> its content, for a sentencepiece model.

    Args:
        path: the .model file.

    Raises:
        CheckpointError: the model is not BPE with byte fallback, or it changes text before it cuts it.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    _refuse_other_kinds(model, path)
    special = [i for i, item in enumerate(model.pieces) if item.type in (_UNKNOWN, _CONTROL)]
    defined = [i for i, item in enumerate(model.pieces) if item.type == _USER_DEFINED]
    added = [_added(i, model.pieces[i].piece, special=i in special) for i in sorted(special + defined)]
    names = {"unk_token": model.trainer_spec.unk_id, "eos_token": model.trainer_spec.eos_id}
    names["pad_token"] = model.trainer_spec.pad_id
    tokens = {name: model.pieces[i].piece for name, i in names.items() if i >= 0}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": list(_DECODERS)},
        "model": _bpe(model, tokens["unk_token"]),
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": {**settings, **tokens}}


def _bpe(model: Any, unknown: str) -> dict[str, Any]:
    """Vocabulary and merges."""
    vocabulary = {item.piece: i for i, item in enumerate(model.pieces)}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": _merges({item.piece: item.score for item in model.pieces if item.type == _NORMAL}, vocabulary),
    }


def _refuse_other_kinds(model: Any, path: Path) -> None:
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    wrong = [
        name
        for name, is_wrong in (
            ("another algorithm than BPE", trainer.model_type != 2),
            ("no byte fallback", not trainer.byte_fallback),
            ("a normalizer", bool(normalizer.precompiled_charsmap)),
            ("a space in front of texts", normalizer.add_dummy_prefix),
            ("spaces taken away", normalizer.remove_extra_whitespaces),
        )
        if is_wrong
    ]
    if wrong:
        raise CheckpointError(
            "this sentencepiece model cannot be rewritten as a tokenizer.json",
            where=str(path),
            got=", ".join(wrong),
            allowed="BPE with byte fallback that leaves text as it is, such as `moba-train prep` trains",
            fix="Name a folder with the model's tokenizer.json: --tokenizer DIR.",
        )


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[list[str]]:
    """Every pair of pieces that makes a third, the best score first; of one piece, in the order of its halves' ids."""
    merges: list[tuple[float, int, int, list[str]]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocabulary[left], vocabulary[right], [left, right]))
    return [pair for *_, pair in sorted(merges)]


def _added(token: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,  # then it is looked for where spaces are marked already
        "special": special,
    }
