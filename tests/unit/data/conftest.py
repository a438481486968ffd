"""A small corpus and a tokenizer trained on it, made once for all data tests."""

from pathlib import Path

import pytest

from moba_train.data.needles import special_words
from moba_train.data.tokenizer import Tokenizer, train_tokenizer

LINES = (
    "def add(left, right):\n    return left + right\n",
    "class Tree:\n    def __init__(self, children):\n        self.children = list(children)\n",
    "# Ünïcödé, 漢字 and emoji 🙂 stay as they are\n",
    "for index, value in enumerate(values):\n\tprint(index, value)\n\n",
)


def corpus(num_documents: int) -> list[str]:
    """Documents that differ from one another."""
    return [f"# document {i}\n" + "".join(LINES[(i + j) % 4] for j in range(8 + i % 40)) for i in range(num_documents)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """700 ids, the needle words among them."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    words = special_words()
    return train_tokenizer(corpus(60), folder / "tokenizer.model", vocab_size=700, words=words)
